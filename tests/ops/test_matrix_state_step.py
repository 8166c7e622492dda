"""Steps of matrix states: what XLA does in few passes is the definition's."""

import jax.numpy as jnp
import pytest
from helpers.matrix_steps import KINDS, K, call_of

from based_jax.ops.matrix_state_step import IMPLEMENTATIONS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("decays", "dtype"), [(1, "float32"), (K, "bfloat16")])
def test_few_passes_equal_the_definition(kind, decays, dtype, normal, close):
    call = call_of(kind, normal, decays=decays, dtype=dtype)
    (o, after), (right, state) = (IMPLEMENTATIONS[impl].compute(call) for impl in ("xla_passes", "oracle"))
    assert o.dtype == jnp.dtype(dtype)
    close(o, right, dtype)
    close(after, state)

"""Steps of matrix states: what XLA does in few passes is the definition's."""

import jax
import jax.numpy as jnp
import pytest

from based_jax.ops.calls import MatrixStepCall
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS

B, H, K, V = 3, 2, 5, 7
KINDS = ("decay", "bonus", "delta_rule", "low_rank")


def call_of(kind, normal, *, decays=K, dtype="float32", sizes=(B, H, K, V)):
    """Return a token of an operation, with the state before it."""
    B, H, K, V = sizes
    q, k, v = (normal(B, H, size, dtype=dtype) for size in (K, K, V))
    unit = normal(B, H, K)
    unit = unit / jnp.linalg.norm(unit, axis=-1, keepdims=True)
    more = {
        "decay": {},
        "bonus": {"bonus": normal(H, K)},
        "delta_rule": {"beta": jax.nn.sigmoid(normal(B, H))},
        "low_rank": {"a": -unit, "b": 0.5 * unit},
    }[kind]
    k = unit.astype(dtype) if kind == "delta_rule" else k
    return MatrixStepCall(q, k, v, -(normal(B, H, decays) ** 2), normal(*sizes), scale=0.3, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("decays", "dtype"), [(1, "float32"), (K, "bfloat16")])
def test_few_passes_equal_the_definition(kind, decays, dtype, normal, close):
    call = call_of(kind, normal, decays=decays, dtype=dtype)
    (o, after), (right, state) = (IMPLEMENTATIONS[impl].compute(call) for impl in ("xla_passes", "oracle"))
    assert o.dtype == jnp.dtype(dtype)
    close(o, right, dtype)
    close(after, state)

"""Products of the tokens that are decoded together: which calls they take, and that a gate is a gate."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.devices import gpus

from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.ops import dispatch
from based_jax.ops.few_tokens import few_tokens_gated, few_tokens_product


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gated_product_is_the_product_and_then_the_gate(dtype, normal, close):
    x, kernel = normal(3, 8, dtype=dtype), normal(8, 10, dtype=dtype)
    value, gate = jnp.split(few_tokens_product(x, kernel), 2, axis=1)
    close(few_tokens_gated(x, kernel), value * jax.nn.silu(gate), dtype)


@pytest.mark.parametrize(
    ("x", "kernel", "words"),
    [
        (jnp.zeros((2, 64)), jnp.zeros((64, 64)), "x must be bfloat16, and is float32"),
        (jnp.zeros((129, 64), "bfloat16"), jnp.zeros((64, 64), "bfloat16"), "1 to 128 tokens, and are 129"),
        (jnp.zeros((2, 64), "bfloat16"), jnp.zeros((64, 96), "bfloat16"), r"multiples of 64, and it is \(64, 96\)"),
    ],
)
def test_refusals_name_the_value(x, kernel, words):
    with gpus(), pytest.raises(UserError, match=words):
        few_tokens_product(x, kernel, impl="hopper")


def test_tokens_that_are_decoded_go_this_way_on_a_gpu():
    """One token of each row has it, a sequence and a row alone have not; nor has any where there is no GPU."""
    mlp = layers.SwiGLU(64, 64, layers.Init(0.02, 0.02, jnp.bfloat16, nnx.Rngs(0)))

    def operations(*shape):
        with dispatch.recorded_choices() as choices:
            jax.eval_shape(mlp, jnp.zeros((*shape, 64)))
        return set(choices)

    both = {"few_tokens_gated", "few_tokens_product"}
    with gpus():
        assert operations(3) == operations(3, 1) == both
        assert not operations(1) and not operations(2, 3)
    assert not operations(3)

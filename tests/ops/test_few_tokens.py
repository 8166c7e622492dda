"""Products of the tokens that are decoded together: which calls they take, and that a gate is a gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.devices import gpus

from based_jax.errors import UserError
from based_jax.nn import layers, mlps
from based_jax.ops import dispatch
from based_jax.ops.few_tokens import few_tokens_gated, few_tokens_product, few_tokens_residual_norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gated_product_is_the_product_and_then_the_gate(dtype, normal, close):
    x, kernel = normal(3, 8, dtype=dtype), normal(8, 10, dtype=dtype)
    value, gate = jnp.split(few_tokens_product(x, kernel), 2, axis=1)
    close(few_tokens_gated(x, kernel), value * jax.nn.silu(gate), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_into_the_stream_is_added_and_normed(has_bias, dtype, normal, close):
    r, x, kernel, scale = normal(3, 10), normal(3, 8, dtype=dtype), normal(8, 10, dtype=dtype), normal(10)
    bias = normal(10) if has_bias else None
    total, found = few_tokens_residual_norm(r, x, kernel, bias, scale, eps=0.1)
    y = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + (0 if bias is None else np.asarray(bias))
    expected = np.asarray(r) + y
    close(total, expected, dtype)
    close(found, expected / np.sqrt((expected**2).mean(axis=1, keepdims=True) + 0.1) * np.asarray(scale), dtype)
    assert total.dtype == jnp.float32 and found.dtype == dtype


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


@pytest.mark.parametrize(
    ("r", "words"),
    [
        (jnp.zeros((2, 128), "bfloat16"), "r must be float32, and is bfloat16"),
        (jnp.zeros((2, 192)), "multiple of 128 up to 8192, and are 192"),
    ],
)
def test_refusals_of_a_product_into_the_stream(r, words):
    x, kernel = jnp.zeros((2, 64), "bfloat16"), jnp.zeros((64, r.shape[1]), "bfloat16")
    with gpus(), pytest.raises(UserError, match=words):
        few_tokens_residual_norm(r, x, kernel, None, jnp.ones(r.shape[1]), impl="hopper")


def test_tokens_that_are_decoded_go_this_way_on_a_gpu():
    """One token of each row has it, a sequence and a row alone have not; nor has any where there is no GPU."""
    mlp = mlps.SwiGLU(64, 64, layers.Init(0.02, 0.02, jnp.bfloat16, nnx.Rngs(0)))

    def operations(*shape):
        with dispatch.recorded_choices() as choices:
            jax.eval_shape(mlp, jnp.zeros((*shape, 64)))
        return set(choices)

    with gpus():
        assert operations(3) == {"few_tokens_gated"}  # the next norm has the rest to do
        assert operations(3, 1) == {"few_tokens_gated", "few_tokens_product"}
        assert not operations(1) and not operations(2, 3)
    assert not operations(3)

"""The ends of a mixer for a token: definitions, what refuses them, and that a step of one sequence goes this way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.devices import gpus

from based_jax.errors import UserError
from based_jax.nn.lm import LM
from based_jax.nn.lm_config import LMConfig
from based_jax.ops import dispatch
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.token_products import token_products, token_sums

D = 10


@pytest.mark.parametrize(("dtype", "batch"), [("float32", 1), ("bfloat16", 2)])
def test_products_and_sums_are_their_definition(dtype, batch, normal, close):
    r, y, scale = normal(batch, D), normal(2, batch, D, dtype=dtype), normal(D)
    kernels = normal(D, 4, dtype=dtype), normal(D, 6, dtype=dtype)

    @jax.jit
    def run(r, y, scale, kernels):
        return token_products(r, Pieces(y), scale, kernels, eps=0.1), token_sums(y[0], kernels[0])

    (total, found), sums = run(r, y, scale, kernels)
    wide_r, wide_y, wide_scale = (np.asarray(x, np.float64) for x in (r, y, scale))
    t = wide_r + wide_y.sum(axis=0)
    x = t / np.sqrt(np.mean(t * t, axis=1, keepdims=True) + 0.1) * wide_scale
    close(total, t, dtype)
    for z, kernel in zip(found, kernels, strict=True):
        close(z, x @ np.asarray(kernel, np.float64), dtype)
    close(sums.sum(axis=0), wide_y[0] @ np.asarray(kernels[0], np.float64), dtype)


@pytest.mark.parametrize(
    ("batch", "kernel", "words"),
    [
        (2, jnp.zeros((256, 64), "bfloat16"), "for one token, and there are 2"),
        (1, jnp.zeros((256, 64)), "matrix must be bfloat16, and is float32"),
        (1, jnp.zeros((256, 80), "bfloat16"), r"\(256, 80\)"),
        (1, jnp.zeros((6272, 64), "bfloat16"), "up to 6144"),
    ],
)
def test_refused_matrices_are_named(batch, kernel, words):
    r, scale = jnp.zeros((batch, len(kernel))), jnp.ones(len(kernel))
    with gpus():
        with pytest.raises(UserError, match=words):
            token_products(r, None, scale, (kernel,), impl="hopper")
        with pytest.raises(UserError, match=words):
            token_sums(r, kernel, impl="hopper")


def test_mixers_of_one_sequence_end_this_way(close):
    """And those of several do not; what all of them add up to is the same."""
    options = {"num_heads": 2}
    layers = ("conv", {}), ("taylor", options | {"feature_dim": 4}), ("window", options), ("attention", options)
    model = LM(LMConfig(layers=layers, d_model=8, vocab_size=9, dtype="float32"), rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model, ids):
        _, caches = model.step(ids, model.init_cache(len(ids), 4))
        return model.step(ids + 1, caches)[0]

    found = []
    for batch in (1, 2):
        with dispatch.recorded_choices() as choices:
            found.append(step(model, jnp.full(batch, 3)))
        assert {"token_products", "token_sums"}.isdisjoint(choices) == (batch > 1)
    close(found[0][0], np.asarray(found[1][1], np.float64), "float32")

"""Half a layer of a token: its definition, what refuses it, and that a step of one sequence goes this way."""

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
from based_jax.ops.token_layer import token_conv, token_mlp

D, F, TAPS = 10, 6, 3


def normed_product(r, y, scale, first, eps):
    t = r + y.sum(axis=0)
    return t, t / np.sqrt(np.mean(t * t, axis=1, keepdims=True) + eps) * scale @ first


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.fixture
def drawn(normal):
    """Return arrays in a dtype, and as numpy's of fp64."""

    def draw(dtype, batch):
        shapes = {"y": (2, batch, D), "first": (D, 2 * F), "second": (F, D)}
        wide = {"r": (batch, D), "scale": (D,), "bias": (2 * F,), "kernel": (TAPS, F), "last_bias": (D,)}
        arrays = {name: normal(*shape, dtype=dtype) for name, shape in (shapes | {"state": (batch, TAPS, F)}).items()}
        arrays |= {name: normal(*shape) for name, shape in wide.items()}
        return arrays, {name: np.asarray(x, np.float64) for name, x in arrays.items()}

    return draw


@pytest.mark.parametrize(("dtype", "batch"), [("float32", 1), ("bfloat16", 2)])
def test_an_mlp_is_its_definition(dtype, batch, drawn, close):
    a, x = drawn(dtype, batch)
    run = jax.jit(lambda a: token_mlp(a["r"], Pieces(a["y"]), a["scale"], a["first"], a["second"], eps=0.1))
    found, pieces = run(a)
    t, product = normed_product(x["r"], x["y"], x["scale"], x["first"], 0.1)
    u, g = np.split(product, 2, axis=1)
    close(found, t, dtype)
    close(pieces.sums.sum(axis=0), u * silu(g) @ x["second"], dtype)


@pytest.mark.parametrize(("dtype", "batch"), [("float32", 2), ("bfloat16", 1)])
def test_a_convolution_is_its_definition(dtype, batch, drawn, close):
    a, x = drawn(dtype, batch)
    names = "scale", "first", "bias", "kernel", "state", "second", "last_bias"
    run = jax.jit(lambda a: token_conv(a["r"], Pieces(a["y"]), *(a[name] for name in names)))
    found, pieces, state = run(a)
    t, product = normed_product(x["r"], x["y"], x["scale"], x["first"], 1e-5)
    u, g = np.split(product + x["bias"], 2, axis=1)
    inputs = np.concatenate([x["state"][:, 1:], u[:, None]], axis=1)
    close(found, t, dtype)
    close(pieces.sums.sum(axis=0), silu((x["kernel"] * inputs).sum(axis=1)) * g @ x["second"] + x["last_bias"], dtype)
    close(state, inputs, dtype)


BF16 = {name: jnp.zeros(shape, "bfloat16") for name, shape in {"first": (256, 256), "second": (128, 256)}.items()}


@pytest.mark.parametrize(
    ("batch", "changed", "words"),
    [
        (2, {}, "for one token, and there are 2"),
        (1, {"second": jnp.zeros((128, 256))}, "second matrix must be bfloat16, and is float32"),
        (1, {"first": jnp.zeros((256, 192), "bfloat16"), "second": jnp.zeros((96, 256), "bfloat16")}, r"\(96, 256\)"),
        (1, {"first": jnp.zeros((256, 8704), "bfloat16"), "second": jnp.zeros((4352, 256), "bfloat16")}, "F 4352"),
    ],
)
def test_refusals_name_the_value(batch, changed, words):
    matrices = BF16 | changed
    with gpus(), pytest.raises(UserError, match=words):
        token_mlp(jnp.zeros((batch, 256)), None, jnp.ones(256), *matrices.values(), impl="hopper")


def test_a_step_of_one_sequence_goes_this_way():
    """And one of several does not; what both add up to is the same."""
    layers = ("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4})
    model = LM(LMConfig(layers=layers, d_model=8, vocab_size=9, dtype="float32"), rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model, ids):
        return model.step(ids, model.init_cache(len(ids), 4))[0]

    found = []
    for batch in (1, 2):
        with dispatch.recorded_choices() as choices:
            found.append(step(model, jnp.full(batch, 3)))
        assert {"token_conv", "token_mlp"}.isdisjoint(choices) == (batch > 1)
    np.testing.assert_allclose(found[0][0], found[1][1], rtol=1e-5, atol=1e-6)

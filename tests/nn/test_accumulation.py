"""Sums over tokens are fp32 in models that compute in bf16, where a sum stops growing at 256 times what it adds."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.accumulation import narrow_sums
from helpers.devices import H100, gpus
from helpers.small_mixers import SMALL

from based_jax.nn import layers
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS, make_mixer

B, SHORT, LONG, D = 5, 11, 131, 16
SIZES = B, SHORT, LONG, 64  # of these, and of a chunk's 64 tokens, no other dimension has a multiple
PLACES = {"cpu": contextlib.nullcontext, "H100": lambda: gpus(H100), "A100": lambda: gpus("NVIDIA A100")}


def check_mixer(kind, place, length):
    """Check a mixer's passes over packed documents on a CPU, and over whole rows on GPUs, where other forms run."""
    options = SMALL.get(kind, {}) | ({"l_max": length} if "l_max" in SMALL.get(kind, {}) else {})
    mixer = make_mixer(kind, D, std=0.2, out_std=0.2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(mixer)
    packed = place == "cpu" or kind == "window"  # of which cuDNN, which is not there, takes whole rows
    x, ids = jnp.ones((B, length, D), jnp.bfloat16), jnp.ones((B, length), jnp.int32) if packed else None

    def loss(params):
        return nnx.merge(graphdef, params)(x, ids).astype(jnp.float32).sum()

    with PLACES[place]():
        assert not narrow_sums(jax.value_and_grad(loss), params, sizes=SIZES)


@pytest.mark.parametrize("kind", MIXERS)
def test_mixers_sum_over_tokens_in_fp32(kind):
    check_mixer(kind, "cpu", SHORT)


@pytest.mark.long
@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", MIXERS)
def test_every_form_sums_over_tokens_in_fp32(kind, place, length):
    check_mixer(kind, place, length)


@pytest.mark.parametrize("norm, mlp", [("rms", "swiglu"), ("layer", "identity")])
def test_models_sum_over_tokens_in_fp32(norm, mlp):
    mixers = (("conv", {}), ("taylor", {"num_heads": 2}))
    config = LMConfig(mixers, D, vocab_size=32, norm=norm, mlp=mlp, embed_norm=True)
    graphdef, params = nnx.split(LM(config, rngs=nnx.Rngs(0)))
    ids = jnp.ones((B, SHORT), jnp.int32)

    def loss(params):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(ids, ids, dropout_key=jax.random.key(0))
        return model.cross_entropy(hidden, ids)[0].sum() + model.logits(hidden).sum()

    assert not narrow_sums(jax.value_and_grad(loss), params, sizes=SIZES)


def test_the_search_finds_what_it_is_for():
    x, weight = jnp.ones((B, SHORT, D), jnp.bfloat16), jnp.ones(D, jnp.bfloat16)

    def looped(weight):
        return jax.lax.scan(lambda total, row: (total + (row * weight).sum(), None), jnp.float32(0), x[0])[0]

    for loss, found in (
        (lambda weight: (x * weight[None, None]).astype(jnp.float32).sum(), "reduce_sum"),
        (lambda weight: jnp.cumsum(x * weight[None, None], axis=1).astype(jnp.float32).sum(), "cumsum"),
        (looped, "a loop adds to"),
    ):
        assert any(line.startswith(found) for line in narrow_sums(jax.grad(loss), weight, sizes=SIZES))


def test_the_gradient_of_a_bias_counts_all_tokens():
    """65,536 ones: in bf16 a sum of them ends at 256, or at 16,384 where 64 are added up apart."""
    layer = layers.linear(1, 2, (None, None), layers.Init(0.02, 0.02, jnp.bfloat16, nnx.Rngs(0)), bias=True)
    x = jnp.ones((64, 1024, 1), jnp.bfloat16)
    grads = jax.jit(nnx.grad(lambda layer: layer(x).astype(jnp.float32).sum()))(layer)
    np.testing.assert_array_equal(grads["bias"][...], [65536.0, 65536.0])

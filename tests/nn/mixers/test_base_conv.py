"""The variants of BaseConv beside the short one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.decoding import in_one_pass, prefill_then_step

from based_jax.errors import UserError
from based_jax.nn.mixers import make_mixer

D, T = 4, 13


def test_a_dilated_mixer_decodes_what_it_computes_in_parallel(normal, close):
    mixer = make_mixer("base_conv", D, dilation=3, rngs=nnx.Rngs(0))
    x = normal(2, T, D)
    close(prefill_then_step(mixer, x, 5)[0], in_one_pass(mixer, x))
    assert mixer.state_size(T) == 7 * D


@pytest.mark.parametrize("kind", ["long_conv", "implicit_conv"])
def test_long_convolution_with_skip_gate_and_residual(kind, normal, close):
    mixer, x = make_mixer(kind, D, l_max=T, rngs=nnx.Rngs(0)), normal(2, T, D)
    taps = np.asarray(jax.jit(lambda mixer: mixer.filter(T))(mixer))
    assert taps.shape == (T, D)
    conv = [sum(taps[t - s] * np.asarray(x[:, s]) for s in range(t + 1)) for t in range(T)]
    close(in_one_pass(mixer, x), (np.stack(conv, axis=1) + x) * mixer.projection(x) + x)


@pytest.mark.parametrize("kind", ["long_conv", "implicit_conv", "hyena"])
def test_longer_than_the_filter(kind):
    mixer = nnx.eval_shape(lambda: make_mixer(kind, D, l_max=8, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="The sequence has 9 tokens; the filter is l_max = 8 long"):
        jax.eval_shape(in_one_pass, mixer, jnp.ones((1, 9, D)))
    with pytest.raises(UserError, match="has 9 tokens"):
        mixer.init_cache(1, 9)

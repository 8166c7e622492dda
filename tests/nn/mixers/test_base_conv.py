"""The variants of BaseConv beside the short one."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax.errors import UserError
from based_jax.nn.mixers import make_mixer

D, T = 4, 13


def test_a_dilated_mixer_decodes_what_it_computes_in_parallel(normal, close):
    mixer = make_mixer("base_conv", D, dilation=3, rngs=nnx.Rngs(0))
    x = normal(2, T, D)
    y, cache = mixer.prefill(x[:, :5], mixer.init_cache(2, T))
    outputs = [y]
    for t in range(5, T):
        y, cache = mixer.step(x[:, t], cache)
        outputs.append(y[:, None])
    close(np.concatenate(outputs, axis=1), mixer(x))
    assert mixer.state_size(T) == 7 * D


@pytest.mark.parametrize("kind", ["long_conv", "implicit_conv"])
def test_long_convolution_with_skip_gate_and_residual(kind, normal, close):
    mixer, x = make_mixer(kind, D, l_max=T, rngs=nnx.Rngs(0)), normal(2, T, D)
    taps = np.asarray(mixer.filter(T))
    assert taps.shape == (T, D)
    conv = [sum(taps[t - s] * np.asarray(x[:, s]) for s in range(t + 1)) for t in range(T)]
    close(mixer(x), (np.stack(conv, axis=1) + x) * mixer.projection(x) + x)


@pytest.mark.parametrize("kind", ["long_conv", "implicit_conv", "hyena"])
def test_longer_than_the_filter(kind):
    mixer = make_mixer(kind, D, l_max=8, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="The sequence has 9 tokens; the filter is l_max = 8 long"):
        mixer(jnp.ones((1, 9, D)))
    with pytest.raises(UserError, match="has 9 tokens"):
        mixer.init_cache(1, 9)

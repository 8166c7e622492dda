import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax.nn.mixers import make_mixer

D, T, M = 8, 9, 4


@pytest.fixture
def mixer():
    return make_mixer("prefix", D, num_heads=2, feature_dim=4, enc_length=M, std=0.5, out_std=0.5, rngs=nnx.Rngs(0))


def test_the_prefix_is_read_in_no_order_and_the_rest_causally(mixer, normal):
    x = normal(1, T, D)
    for t in range(T):
        moved = np.abs(mixer(x.at[:, t].add(1.0)) - mixer(x)).max(axis=(0, 2)) > 1e-5
        seen = np.arange(T) >= (0 if t < M else t)
        np.testing.assert_array_equal(moved, seen)


def test_prefill_of_the_prefix_and_steps_equal_one_pass(mixer, normal, close):
    x = normal(2, T, D)
    whole = mixer(x)
    y, cache = mixer.prefill(x[:, :M], mixer.init_cache(2, T))
    close(y, whole[:, :M])
    y, cache = mixer.prefill(x[:, M : M + 2], cache)
    close(y, whole[:, M : M + 2])
    for t in range(M + 2, T):
        y, cache = mixer.step(x[:, t], cache)
        close(y, whole[:, t])


def test_left_padding_moves_the_prefix_with_the_document(mixer, normal, close):
    x = normal(1, T, D)
    padded = jnp.concatenate([normal(1, 3, D), x], axis=1)
    ids = jnp.asarray([[0] * 3 + [1] * T])
    close(mixer(padded, ids)[:, 3:], mixer(x))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.decoding import in_one_pass

from based_jax.nn.mixers import make_mixer

D, T, M = 8, 9, 4


@pytest.fixture
def mixer():
    return make_mixer("prefix", D, num_heads=2, feature_dim=4, enc_length=M, std=0.5, out_std=0.5, rngs=nnx.Rngs(0))


def test_the_prefix_is_read_in_no_order_and_the_rest_causally(mixer, normal):
    x = normal(1, T, D)
    moved = np.abs(in_one_pass(mixer, x + jnp.eye(T)[..., None]) - in_one_pass(mixer, x)).max(axis=2) > 1e-5
    tokens = np.arange(T)
    np.testing.assert_array_equal(moved, tokens >= np.where(tokens < M, 0, tokens)[:, None])


def test_prefill_of_the_prefix_and_steps_equal_one_pass(mixer, normal, close):
    x = normal(2, T, D)

    @jax.jit
    def in_pieces(mixer, x):
        outputs, cache = [], mixer.init_cache(2, T)
        for piece in jnp.split(x, (M, M + 2), axis=1)[:2]:
            y, cache = mixer.prefill(piece, cache)
            outputs.append(y)
        for t in range(M + 2, T):
            y, cache = mixer.step(x[:, t], cache)
            outputs.append(y[:, None])
        return jnp.concatenate(outputs, axis=1)

    close(in_pieces(mixer, x), in_one_pass(mixer, x))


def test_left_padding_moves_the_prefix_with_the_document(mixer, normal, close):
    x = normal(1, T, D)
    padded = jnp.concatenate([normal(1, 3, D), x], axis=1)
    ids = jnp.asarray([[0] * 3 + [1] * T])
    close(in_one_pass(mixer, padded, ids)[:, 3:], in_one_pass(mixer, x))

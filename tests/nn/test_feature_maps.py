import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.decoding import in_one_pass, prefill_then_step

from based_jax.errors import UserError
from based_jax.nn.feature_maps import COSFORMER_HORIZON, FEATURE_MAPS, orthogonal_directions
from based_jax.nn.mixers import make_mixer

K, H, T = 4, 2, 7


def mapped(name, q, k, places):
    return FEATURE_MAPS[name](H, K, rngs=nnx.Rngs(0))(q, k, places)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_size_and_dtype(name, normal):
    feature_map = FEATURE_MAPS[name](H, K, rngs=nnx.Rngs(0))
    phi_q, phi_k = feature_map(normal(3, T, H, K, dtype="bfloat16"), normal(3, T, H, K), jnp.zeros((3, T), int))
    assert phi_q.shape == phi_k.shape == (3, T, H, feature_map.expanded_dim)
    assert phi_q.dtype == phi_k.dtype == jnp.float32


def test_elementwise_maps(normal):
    x = np.asarray(normal(1, T, H, K))
    expected = {
        "relu": np.maximum(x, 1e-12),
        "squared": x**2,
        "elu": np.where(x > 0, x + 1, np.exp(x)),
        "identity": x,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(mapped(name, x, x, jnp.zeros((1, T), int))[0], values, rtol=1e-5, atol=1e-6)


def test_cosformer_weighs_by_distance(normal):
    q, k = normal(1, T, H, K), normal(1, T, H, K)
    phi_q, phi_k = mapped("cosformer", q, k, 1000 + jnp.arange(T)[None])
    scores = np.einsum("bthe,bshe->bhts", phi_q, phi_k)
    distance = np.arange(T)[:, None] - np.arange(T)
    plain = np.einsum("bthe,bshe->bhts", np.maximum(q, 0), np.maximum(k, 0))
    np.testing.assert_allclose(scores, plain * np.cos(np.pi / 2 * distance / COSFORMER_HORIZON), atol=1e-5)


def test_cosformer_over_the_length_at_hand_is_zoology_s(normal):
    """Its horizon is the number of tokens; a cache does not know it."""
    options = {"num_heads": 2, "feature_dim": K, "feature_map": "cosformer", "rngs": nnx.Rngs(1), "std": 0.5}
    at_hand, same = (
        make_mixer("linear", 8, horizon=horizon, **options | {"rngs": nnx.Rngs(1)}) for horizon in (None, T)
    )
    x = normal(2, T, 8)
    np.testing.assert_array_equal(in_one_pass(at_hand, x), in_one_pass(same, x))
    assert not np.allclose(in_one_pass(at_hand, x), in_one_pass(make_mixer("linear", 8, **options), x))
    with pytest.raises(UserError, match="decoding cannot know"):
        at_hand.init_cache(2, T)


def test_performer_estimates_the_softmax_kernel(normal):
    """The mean of 256 directions of K = 4; the reference's rows have norm 1/8, not sqrt(K), and so do ours."""
    directions = orthogonal_directions(256, K)
    np.testing.assert_allclose(directions[:K] @ directions[:K].T, np.eye(K) / 64, atol=1e-6)
    phi_q, phi_k = mapped("performer", normal(1, T, H, K), normal(1, T, H, K), jnp.zeros((1, T), int))
    assert (np.asarray(phi_q) > 0).all() and (np.asarray(phi_k) > 0).all()


def test_all_poly_is_of_second_degree(normal):
    """f(2x) - 2 f(x) + f(0) is what remains of a square, four times over minus twice."""
    x = normal(1, T, H, K)
    one, two = (mapped("all_poly", s * x, x, jnp.zeros((1, T), int))[0] for s in (1.0, 2.0))
    np.testing.assert_allclose(two, 4 * one, rtol=1e-4, atol=1e-5)


def test_hedgehog_starts_from_softmax_of_both_signs(normal):
    x = normal(1, T, H, K)
    phi_q, phi_k = mapped("hedgehog", x, x, jnp.zeros((1, T), int))
    np.testing.assert_array_equal(phi_q, phi_k)
    np.testing.assert_allclose(phi_q.sum(axis=-1), 2, rtol=1e-5)
    up, down = np.split(np.asarray(phi_q), 2, axis=-1)
    np.testing.assert_allclose(np.log(up / up[..., :1]), -np.log(down / down[..., :1]), atol=1e-4)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_a_mixer_with_each_map_decodes_what_it_computes_in_parallel(name, normal):
    """Relative to the values: identity and polynomial maps have normalisers near zero."""
    mixer = make_mixer("linear", 8, num_heads=2, feature_dim=K, feature_map=name, rngs=nnx.Rngs(1), std=0.5)
    x = normal(2, T, 8)
    whole, (decoded, _, _) = in_one_pass(mixer, x), prefill_then_step(mixer, x, 3)
    np.testing.assert_allclose(decoded, whole, atol=1e-4 * np.abs(whole).max())

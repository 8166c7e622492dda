"""Decays between the tokens of a chunk by levels, as the Hopper kernels make them."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import channel_decays

TOKENS = 64


def log_decays(rng):
    """Return log-decays of every size, from none to what leaves nothing."""
    g = -rng.exponential(size=TOKENS) * 10.0 ** rng.uniform(-3, 3, size=TOKENS)
    return np.where(rng.random(TOKENS) < 0.1, 0.0, g)


@jax.jit
def of_level(level):
    """Return M, M^T and which pairs meet at a level, as arrays of 0 and 1."""
    tokens = jnp.arange(TOKENS)
    border = channel_decays.border(tokens, level)
    M = channel_decays.between(tokens, tokens, border), channel_decays.between_transposed(tokens, tokens, border)
    return *M, channel_decays.meet_later(tokens, tokens, level), channel_decays.meet(tokens, tokens, level)


def test_each_pair_meets_at_one_level_with_the_decay_between_its_tokens(rng):
    g, found, times = log_decays(rng), np.zeros((TOKENS, TOKENS)), np.zeros((TOKENS, TOKENS))
    for level in range(channel_decays.LEVELS):
        M, M_back, later, either = (np.float64(x) for x in of_level(level))
        np.testing.assert_array_equal(M_back, M.T)
        np.testing.assert_array_equal(either, later + later.T)
        weights = np.exp(M @ g)
        assert (M @ g <= 0).all()
        found, times = found + later * np.outer(weights, weights), times + later
    np.testing.assert_array_equal(times, np.tri(TOKENS, k=-1))
    right = [[np.exp(g[s + 1 : t + 1].sum()) if s < t else 0.0 for s in range(TOKENS)] for t in range(TOKENS)]
    np.testing.assert_allclose(found, right, rtol=1e-12, atol=1e-300)


def test_borders_of_a_chunk_reach_from_its_beginning_and_to_its_end(rng):
    g, tokens = log_decays(rng), jnp.arange(TOKENS)
    since, until = (
        np.float64(channel_decays.between(tokens, tokens, jnp.int32(border))) @ g
        for border in (channel_decays.SINCE, channel_decays.UNTIL)
    )
    np.testing.assert_allclose(since, np.cumsum(g))
    np.testing.assert_allclose(until, g.sum() - np.cumsum(g), rtol=1e-9, atol=1e-9)

"""Walks of tiles over what they see, against every pair."""

import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.ops import segments, softmax_walks

T, TILE = 64, 8


@pytest.fixture
def numbers(packed_ids):
    return segments.numbered(packed_ids(T))


def _seen(numbers, window=T):
    """Return what each query sees: (rows, queries, keys)."""
    near = np.tri(T, dtype=bool) & ~np.tri(T, k=-window, dtype=bool)
    return near & np.asarray(segments.same_document(numbers, numbers))


@pytest.mark.parametrize("window", [9, 64])
def test_first_keys_and_last_queries_have_all_that_is_seen(numbers, window):
    seen = _seen(numbers, window)
    first = np.where(seen.any(2), seen.argmax(2), T).reshape(6, -1, TILE).min(2)
    np.testing.assert_array_equal(softmax_walks.Documents(numbers).first_keys(window, TILE), first)
    last = np.where(seen.any(1), T - 1 - seen[:, ::-1].argmax(1), -1).reshape(6, -1, TILE).max(2)
    found = np.asarray(softmax_walks.Documents(numbers).last_queries(window, TILE))
    assert (found >= last).all() and ((found == -1) == (last == -1)).all()
    full = softmax_walks.Documents(numbers[:2]).last_queries(window, TILE)  # without padding
    np.testing.assert_array_equal(full, last[:2])


def test_queries_see_nothing_outside_their_walk_and_all_within_the_plain_part(numbers):
    walks, seen = np.asarray(softmax_walks.Documents(numbers).keys_of_queries(TILE)), _seen(numbers)
    for row, tile in np.ndindex(walks.shape[:2]):
        begin, end, plain = walks[row, tile]
        queries = seen[row, tile * TILE : (tile + 1) * TILE]
        real = np.asarray(numbers[row, tile * TILE : (tile + 1) * TILE]) != 0
        assert begin < end and not queries[:, :begin].any() and not queries[:, end:].any()
        assert queries[real, plain : tile * TILE].all()
    assert (walks[0, :, 2] == 0).all()  # one document


def test_keys_are_seen_by_nobody_outside_their_walk_and_by_all_within_the_plain_part(numbers):
    walks, seen = np.asarray(softmax_walks.Documents(numbers).queries_of_keys(TILE)), _seen(numbers)
    for row, tile in np.ndindex(walks.shape[:2]):
        begin, end, plain = walks[row, tile]
        keys = seen[row, :, tile * TILE : (tile + 1) * TILE]
        real = np.asarray(numbers[row]) != 0
        assert begin < end and not keys[:begin].any() and not keys[end:].any()
        later = np.arange((tile + 1) * TILE, max(plain, (tile + 1) * TILE))
        assert keys[later][real[later]].all()
    assert (walks[0, :, 2] == T).all()


@pytest.mark.parametrize("time", [T, T - 1, T - TILE, 1])
@pytest.mark.parametrize("window", [9, T])
def test_one_document_is_what_its_numbers_say(time, window):
    numbers = jnp.tile(jnp.where(jnp.arange(T) < time, 1, 0), (2, 1))
    expected, found = (softmax_walks.documents(numbers, x) for x in (None, time))
    assert isinstance(found, softmax_walks.OneDocument)
    for of in (
        lambda x: x.first_keys(window, TILE),
        lambda x: x.last_queries(window, TILE),
        lambda x: x.first_keys(T, 1),
        lambda x: x.keys(),
        lambda x: x.keys_of_queries(TILE),
        lambda x: x.queries_of_keys(TILE),
    ):
        np.testing.assert_array_equal(of(found), np.broadcast_to(of(expected), of(found).shape))

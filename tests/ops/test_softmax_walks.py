"""Walks of tiles over what they see, against every pair."""

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
    np.testing.assert_array_equal(softmax_walks.first_keys(numbers, window, TILE), first)
    last = np.where(seen.any(1), T - 1 - seen[:, ::-1].argmax(1), -1).reshape(6, -1, TILE).max(2)
    found = np.asarray(softmax_walks.last_queries(numbers, window, TILE))
    assert (found >= last).all() and ((found == -1) == (last == -1)).all()
    full = softmax_walks.last_queries(numbers[:2], window, TILE)  # without padding
    np.testing.assert_array_equal(full, last[:2])


def test_queries_see_nothing_outside_their_walk_and_all_within_the_plain_part(numbers):
    walks, seen = np.asarray(softmax_walks.keys_of_queries(numbers, TILE)), _seen(numbers)
    for row, tile in np.ndindex(walks.shape[:2]):
        begin, end, plain = walks[row, tile]
        queries = seen[row, tile * TILE : (tile + 1) * TILE]
        real = np.asarray(numbers[row, tile * TILE : (tile + 1) * TILE]) != 0
        assert begin < end and not queries[:, :begin].any() and not queries[:, end:].any()
        assert queries[real, plain : tile * TILE].all()
    assert (walks[0, :, 2] == 0).all()  # one document


def test_keys_are_seen_by_nobody_outside_their_walk_and_by_all_within_the_plain_part(numbers):
    walks, seen = np.asarray(softmax_walks.queries_of_keys(numbers, TILE)), _seen(numbers)
    for row, tile in np.ndindex(walks.shape[:2]):
        begin, end, plain = walks[row, tile]
        keys = seen[row, :, tile * TILE : (tile + 1) * TILE]
        real = np.asarray(numbers[row]) != 0
        assert begin < end and not keys[:begin].any() and not keys[end:].any()
        later = np.arange((tile + 1) * TILE, max(plain, (tile + 1) * TILE))
        assert keys[later][real[later]].all()
    assert (walks[0, :, 2] == T).all()

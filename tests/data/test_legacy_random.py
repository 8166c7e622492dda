"""Bulk draws from the legacy stream against one `RandomState.choice` call a row."""

import numpy as np
import pytest

from based_jax.data.legacy_random import follow, uniform_choices, weighted_choices


@pytest.mark.parametrize("population, size, rows", [(1, 1, 5), (2, 2, 50), (37, 5, 200), (4095, 4, 20), (64, 64, 30)])
def test_uniform_choices(population, size, rows):
    bulk, single = np.random.RandomState(7), np.random.RandomState(7)
    expected = [single.choice(population, size, replace=False) for _ in range(rows)]
    np.testing.assert_array_equal(uniform_choices(bulk, population, size, rows), expected)
    assert bulk.randint(2**31) == single.randint(2**31)  # both stand at the same place of the stream


@pytest.mark.parametrize("space, size", [(1, 1), (2, 2), (9, 1), (12, 12), (50, 7), (124, 4), (40, 33)])
@pytest.mark.parametrize("rows", [1, 60, 2000])
def test_weighted_choices(space, size, rows):
    weights = np.random.default_rng(space).exponential(size=space) ** 3
    weights /= weights.sum()
    rng = np.random.RandomState(rows)
    expected = [rng.choice(space, size, replace=False, p=weights) for _ in range(rows)]
    np.testing.assert_array_equal(weighted_choices(np.random.RandomState(rows), weights, size, rows), expected)


def test_follow_reads_a_chain_to_its_end():
    successor = np.array([3, -1, 1, 4, 2, 0])
    assert follow(successor, 0).tolist() == [0, 3, 4, 2, 1]
    assert follow(successor, 1).tolist() == [1]
    assert follow(successor, -1).tolist() == []

import numpy as np
import pytest

from based_jax.data.draws import distinct


@pytest.mark.parametrize("population, size", [(1, 1), (5, 5), (7, 3), (4096, 8)])
def test_a_row_has_distinct_members_of_the_population(population, size):
    rows = distinct(np.random.default_rng(0), population, size, 200)
    assert rows.shape == (200, size) and rows.min() >= 0 and rows.max() < population
    assert all(len(set(row)) == size for row in rows.tolist())


def test_every_ordered_choice_is_equally_likely():
    rows = distinct(np.random.default_rng(1), 4, 2, 24_000)
    counts = np.unique(rows @ [4, 1], return_counts=True)[1]
    assert len(counts) == 12
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)

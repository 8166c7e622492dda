import numpy as np
import pytest

from based_jax.data.compositional_mqar import PRESETS, CompositionalMqarConfig, compositional_mqar
from based_jax.data.mqar import MqarSegment
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def row_by_row(vocab_size, rows, seq_len, pairs, seed, power_a):
    """The publication's order of draws, one call of numpy's legacy generator a row and a choice."""
    rng, third, side = np.random.RandomState(seed), vocab_size // 3, round(pairs**0.5)
    first = np.stack([rng.choice(np.arange(1, third), side, replace=False) for _ in range(rows)])
    second = np.stack([rng.choice(np.arange(third, 2 * third), side, replace=False) for _ in range(rows)])
    orders = np.stack([rng.permutation(pairs) for _ in range(rows)])
    values = np.stack([rng.choice(np.arange(2 * third, vocab_size), pairs, replace=False) for _ in range(rows)])
    steps = np.arange((seq_len - 3 * pairs) // 3)
    law = (steps + 1.0) ** (power_a - 1)
    gaps = np.stack([rng.choice(steps, pairs, replace=False, p=law / law.sum()) for _ in range(rows)])
    for row in range(rows):
        grid = [(a, b) for a in first[row] for b in second[row]]
        yield [grid[i] for i in orders[row]], values[row], gaps[row]


@pytest.mark.parametrize("vocab_size, seq_len, pairs", [(8192, 64, 9), (64, 24, 4), (129, 128, 16), (50, 8, 1)])
def test_examples_are_the_publication_s(vocab_size, seq_len, pairs):
    sizes = (vocab_size, 40, seq_len, pairs)
    inputs, labels = compositional_mqar(*sizes, seed=4, power_a=0.1, random_non_queries=False)
    filled, _ = compositional_mqar(*sizes, seed=4, power_a=0.1)
    np.testing.assert_array_equal(np.where(inputs == 0, 0, filled), inputs)
    for row, (keys, values, gaps) in enumerate(row_by_row(*sizes, 4, 0.1)):
        wanted, asked = np.zeros(seq_len, int), np.full(seq_len, NO_LABEL)
        for i, ((a, b), value, gap) in enumerate(zip(keys, values, gaps, strict=True)):
            wanted[3 * i : 3 * i + 3] = a, b, value
            place = 3 * pairs + 3 * gap
            wanted[place : place + 2], asked[place + 1] = (a, b), value
        np.testing.assert_array_equal(inputs[row], wanted)
        np.testing.assert_array_equal(labels[row], asked)


def test_neither_key_tells_the_value():
    inputs, _ = compositional_mqar(8192, 50, 64, 9, seed=0)
    for row in inputs[:, :27].reshape(50, 9, 3):
        for keys in row[:, 0], row[:, 1]:
            assert sorted(np.unique(keys, return_counts=True)[1]) == [3, 3, 3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 32}, "vocab_size 32"),
        ({"test": (MqarSegment(1, 32, 5),)}, "num_kv_pairs is 5; it is a square"),
        ({"test": (MqarSegment(1, 32, 0),)}, "num_kv_pairs is 0; it is a square"),
        ({"test": (MqarSegment(1, 22, 4),)}, "seq_len 22"),
        ({"test": (MqarSegment(1, 25, 4),)}, "seq_len 25"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        CompositionalMqarConfig(**{"train": PRESETS["tiny"].train, "test": (), **changes})

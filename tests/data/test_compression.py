import numpy as np
import pytest

from based_jax.data.compression import PRESETS, CompressionConfig, CompressionSegment, compression
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def answered(row, alphabet):
    stored, labels = [], []
    for token in row:
        labels.append(stored[token - alphabet - 1] if token > alphabet else NO_LABEL)
        if token < alphabet:
            stored.append(token)
    return labels


@pytest.mark.parametrize("alphabet, max_symbols, num_symbols", [(15, 31, 31), (2, 1, 1), (4, 20, 9)])
def test_labels_are_what_a_reader_answers(alphabet, max_symbols, num_symbols):
    inputs, labels = compression(alphabet, max_symbols, 60, num_symbols, seed=4)
    for row, expected in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert answered(row, alphabet) == expected
        assert row[num_symbols] == alphabet and row.count(alphabet) == 1
        assert sorted(row[num_symbols + 1 :]) == list(range(alphabet + 1, alphabet + 1 + num_symbols))


def test_the_order_of_the_queries_differs_from_row_to_row():
    inputs, _ = compression(4, 8, 100, 8, seed=0)
    assert len(np.unique(inputs[:, 9:], axis=0)) > 90


def test_the_queries_are_part_of_the_vocabulary():
    assert PRESETS["default"].vocab_size == 15 + 1 + 31
    assert PRESETS["default"].test[0].seq_len == 63


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"alphabet": 1}, "alphabet 1"),
        ({"test": (CompressionSegment(1, 32),)}, "num_symbols 32 must be at least 1 and at most max_symbols 31"),
        ({"test": (CompressionSegment(1, 0),)}, "num_symbols 0"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        CompressionConfig(**{"train": PRESETS["tiny"].train, "test": (), **changes})

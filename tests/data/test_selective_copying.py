import numpy as np
import pytest

from based_jax.data.selective_copying import PRESETS, CopyingSegment, SelectiveCopyingConfig, selective_copying
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def answered(row, vocab_size):
    """Read a row token by token and answer it."""
    kept, labels, copying = [], [], False
    for token in row:
        labels.append(kept.pop(0) if copying else NO_LABEL)
        if token == vocab_size - 1:
            copying = True
        elif not copying and token != vocab_size - 2:
            kept.append(token)
    assert not kept
    return labels


@pytest.mark.parametrize("vocab_size, seq_len, num_tokens", [(16, 256, 16), (3, 3, 1), (5, 21, 10), (9, 40, 3)])
def test_labels_are_what_a_reader_answers(vocab_size, seq_len, num_tokens):
    inputs, labels = selective_copying(vocab_size, 60, seq_len, num_tokens, seed=4)
    for row, expected in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert answered(row, vocab_size) == expected
        assert len(expected) - expected.count(NO_LABEL) == num_tokens
        assert row.count(vocab_size - 1) == 1 and row.index(vocab_size - 1) == seq_len - num_tokens - 1


def test_tokens_stand_everywhere_before_the_copy_token():
    inputs, _ = selective_copying(16, 2000, 20, 3, seed=0)
    frequency = (inputs[:, :16] < 14).mean(axis=0)
    np.testing.assert_allclose(frequency, 3 / 16, atol=5 * np.sqrt(3 / 16 / 2000))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 2}, "vocab_size 2"),
        ({"test": (CopyingSegment(1, 8, 4),)}, "num_tokens 4 must be at least 1 and at most 3 of 8"),
        ({"test": (CopyingSegment(1, 8, 0),)}, "num_tokens 0"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        SelectiveCopyingConfig(**{"train": PRESETS["tiny"].train, "test": (), **changes})

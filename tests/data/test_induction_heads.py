import numpy as np
import pytest

from based_jax.data.induction_heads import PRESETS, InductionHeadsConfig, induction_heads
from based_jax.data.segments import LengthSegment
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def answered(row, special):
    labels, answer = [], NO_LABEL
    for position, token in enumerate(row):
        labels.append(answer if token == special else NO_LABEL)
        if token == special and answer == NO_LABEL:
            answer = row[position + 1]
    return labels


@pytest.mark.parametrize("vocab_size, seq_len", [(16, 256), (3, 3), (4, 9), (100, 33)])
def test_labels_are_what_a_reader_answers(vocab_size, seq_len):
    inputs, labels = induction_heads(vocab_size, 60, seq_len, seed=4)
    for row, expected in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert answered(row, vocab_size - 1) == expected
        assert row.count(vocab_size - 1) == 2 and row[-1] == vocab_size - 1 and expected[-1] != NO_LABEL


def test_the_special_token_stands_everywhere():
    inputs, _ = induction_heads(16, 500, 10, seed=0)
    assert set((inputs == 15).argmax(axis=1)) == set(range(8))
    assert set(np.unique(inputs)) == set(range(16))


@pytest.mark.parametrize(
    "changes, message", [({"vocab_size": 2}, "vocab_size 2"), ({"test": (LengthSegment(1, 2),)}, "seq_len 2")]
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        InductionHeadsConfig(**{"train": PRESETS["tiny"].train, "test": (), **changes})

import numpy as np
import pytest

from based_jax.data.memorization import PRESETS, MemorizationConfig, dictionary, memorization
from based_jax.data.segments import LengthSegment
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


@pytest.mark.parametrize("vocab_size, num_keys", [(3, 1), (4, 1), (16, 7), (255, 127), (256, 127)])
def test_the_dictionary_gives_every_key_a_value_of_its_own(vocab_size, num_keys):
    values = dictionary(vocab_size, seed=3).tolist()
    assert len(values) == len(set(values)) == num_keys
    assert all(num_keys <= value < vocab_size - 1 for value in values)
    assert values == dictionary(vocab_size, seed=3).tolist()


@pytest.mark.parametrize("vocab_size, seq_len", [(16, 32), (3, 2), (256, 10)])
def test_labels_are_what_a_reader_with_the_dictionary_answers(vocab_size, seq_len):
    inputs, labels = memorization(vocab_size, 60, seq_len, seed=1, dictionary_seed=9)
    facts = dict(enumerate(dictionary(vocab_size, 9).tolist()))
    for row, expected in zip(inputs.tolist(), labels.tolist(), strict=True):
        answers, key = [], None
        for token in row:
            answers.append(facts[key] if token == vocab_size - 1 else NO_LABEL)
            key = token
        assert answers == expected
        assert row[1::2] == [vocab_size - 1] * (seq_len // 2)


def test_training_and_test_share_the_dictionary_of_the_task_seed():
    tiny = PRESETS["tiny"]
    facts = dictionary(tiny.vocab_size, tiny.seed)
    for split in ("train", "test"):
        inputs, labels = tiny.generate(split, 1)
        np.testing.assert_array_equal(labels[:, 1::2], facts[inputs[:, 0::2]])
    assert (dictionary(16, 0) != dictionary(16, 1)).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 2}, "vocab_size 2"),
        ({"test": (LengthSegment(1, 7),)}, "seq_len 7"),
        ({"test": (LengthSegment(1, 0),)}, "seq_len 0"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        MemorizationConfig(**{"train": PRESETS["tiny"].train, "test": (), **changes})

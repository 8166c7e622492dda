import pytest

from based_jax.data.needle import PRESETS, NeedleConfig, NeedleSegment, grid, needle
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


@pytest.mark.parametrize("depth", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("vocab_size, seq_len, num_needles", [(8192, 100, 1), (64, 50, 4), (2, 3, 1), (9, 12, 4)])
def test_labels_are_what_a_reader_answers(vocab_size, seq_len, num_needles, depth):
    inputs, labels = needle(vocab_size, 60, seq_len, 4, depth, num_needles)
    for row, expected in zip(inputs.tolist(), labels.tolist(), strict=True):
        memory, answers = {}, []
        for position, token in enumerate(row):
            is_key = token < vocab_size // 2
            answers.append(memory.get(token, NO_LABEL) if is_key else NO_LABEL)
            if is_key and token not in memory:
                memory[token] = row[position + 1]
        assert answers == expected
        assert len(memory) == num_needles == len(set(memory.values()))
        assert NO_LABEL not in expected[-num_needles:]


@pytest.mark.parametrize("depth, place", [(0.0, 0), (0.25, 22), (0.5, 44), (1.0, 88)])
def test_the_needles_stand_at_their_depth(depth, place):
    inputs, _ = needle(64, 20, 100, 0, depth, num_needles=4)
    assert ((inputs < 32).argmax(axis=1) == place).all()
    assert (inputs[:, place : place + 8 : 2] < 32).all() and (inputs[:, place + 1 : place + 8 : 2] >= 32).all()


def test_any_depth_reaches_both_ends():
    inputs, _ = needle(64, 1000, 20, 0)
    assert set((inputs < 32).argmax(axis=1)) == set(range(18))


def test_names_tell_length_needles_and_depth():
    names = [segment.name for segment in grid(1, (1024, 2048), (0.0, 0.25, 1.0))]
    assert names == ["1024@0", "1024@0.25", "1024@1", "2048@0", "2048@0.25", "2048@1"]
    assert NeedleSegment(1, 64).name == "64@any" and NeedleSegment(1, 64, 0.5, 4).name == "64x4@0.5"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 3}, "vocab_size 3"),
        ({"test": (NeedleSegment(1, 8, 0.5, 3),)}, "num_needles 3"),
        ({"test": (NeedleSegment(1, 8, 0.5, 0),)}, "num_needles 0"),
        ({"test": (NeedleSegment(1, 8, 1.5),)}, "depth 1.5"),
        ({"test": (NeedleSegment(1, 8, float("nan")),)}, "depth nan"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        NeedleConfig(**{"train": PRESETS["tiny"].train, "test": (), **changes})

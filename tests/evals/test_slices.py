from types import SimpleNamespace

import numpy as np
import pytest

from based_jax.errors import UserError
from based_jax.evals import slices
from based_jax.evals.likelihood import Judged, strided
from based_jax.evals.slices import (
    Slicing,
    documents,
    is_repeated,
    pair_counts,
    pairs_of,
    rare_pairs,
    repeated_pairs,
    slice_losses,
)
from based_jax.labels import NO_LABEL


class Stream(np.ndarray):
    """Tokens in memory."""

    def read(self, start, stop):
        return np.asarray(self)[start:stop]


class Told:
    """A judge whose loss of a token is its id, and who is right about even ones."""

    def judged(self, rows):
        for place, (inputs, labels) in reversed(list(enumerate(rows))):
            assert len(inputs) == len(labels)
            asked = labels != NO_LABEL
            yield place, Judged(np.where(asked, labels, 0).astype(np.float32), asked & (labels % 2 == 0))


def test_a_pair_that_stands_earlier():
    #                        1,2   2,3    3,1    1,2   2,2    2,2   2,3
    assert is_repeated(np.array([1, 2, 3, 1, 2, 2, 2, 3])).tolist() == [False, False, False, True, False, True, True]


def test_pairs_are_counted_over_the_edges_of_blocks(monkeypatch, rng):
    tokens = rng.integers(0, 5, 200)
    wanted = np.unique(pairs_of(np.array([0, 1, 2, 3, 4, 0, 70000])))
    expected = [sum(pair == other for other in pairs_of(tokens)) for pair in wanted]
    for block in (7, 64, 1000):
        monkeypatch.setattr(slices, "BLOCK_TOKENS", block)
        assert pair_counts(slices.blocks(tokens.view(Stream)), wanted).tolist() == expected
    assert expected.count(0) == 1 and sum(expected) > 20


def test_documents_of_a_stream_whatever_its_blocks(monkeypatch):
    stream = np.array([1, 2, 9, 9, 3, 4, 5, 9, 6]).view(Stream)
    for block in (1, 2, 4, 100):
        monkeypatch.setattr(slices, "BLOCK_TOKENS", block)
        assert [x.tolist() for x in documents(stream, 9)] == [[1, 2, 9], [9], [3, 4, 5, 9], [6]]


def test_slices_by_hand():
    """Windows of 5 tokens, of which 3 are judged: 1 2 8 1 2 8 | 8 1 2 8 2 3."""
    text = np.array([1, 2, 8, 1, 2, 8, 2, 3])
    assert [list(map(int, x.ids)) for x in strided(text, 5, 3)] == [[2, 8, 1, 2, 8], [2, 3]]
    training = [np.array([2, 8] * 4)]  # 2,8 four times and 8,2 three times

    def sliced(text, training, slicing):
        return slice_losses(Told(), [text], rare_pairs([text], training, slicing), slicing).set_index("slice")

    found = sliced(text, training, Slicing(5, 3, rare=3))
    assert found.loc["all"].tolist() == [7, *(26 / 7, np.exp(26 / 7)), 5 / 7]
    assert found.loc["recalled", ["tokens", "loss", "accuracy"]].tolist() == [1, 2.0, 1.0]  # 1,2 of the first window
    assert found.loc["others", ["tokens", "loss"]].tolist() == [6, 4.0]
    assert found.loc["behind 1 token", ["tokens", "loss"]].tolist() == [1, 2.0]
    assert found.loc["behind 2 to 3 tokens", ["tokens", "loss"]].tolist() == [2, 4.5]
    assert found.loc["behind 4 to 7 tokens", ["tokens", "loss"]].tolist() == [4, 15 / 4]
    common = sliced(text, training, Slicing(5, 3, rare=4))
    assert common.loc["recalled", ["tokens", "loss"]].tolist() == [2, 5.0]  # and 2,8
    none = sliced(np.array([1, 2]), training, Slicing(5, 3))
    assert none.loc["all", "tokens"] == 1 and "recalled" in none.index and np.isnan(none.loc["recalled", "loss"])


def test_pairs_that_stand_twice_in_a_window():
    text = np.array([1, 2, 1, 2, 3, 3, 3])
    assert repeated_pairs(strided(text, 3, 3)).tolist() == sorted([*pairs_of(np.array([1, 2])), *pairs_of(text[-2:])])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((0, 1), "stride is 1 and length 0; they are 1 <= stride <= length"),
        ((4, 5), "stride is 5 and length 4"),
        ((4, 0), "stride is 0 and length 4"),
        ((4, 4, -1), "rare is -1; it is at least 0"),
    ],
)
def test_what_cannot_be_sliced_is_refused(values, told):
    with pytest.raises(UserError, match=told):
        Slicing(*values)


def test_nothing_to_judge_is_refused():
    judge = SimpleNamespace(judged=lambda rows: iter(()))
    with pytest.raises(UserError, match="There is no token to judge"):
        slice_losses(judge, [np.array([1])], np.zeros(0, np.int64), Slicing(4, 4))

import collections

import numpy as np
import pytest

from based_jax.data import in_context_ngram as module
from based_jax.data.in_context_ngram import (
    PRESETS,
    InContextNgramConfig,
    best_accuracy,
    best_predictions,
    in_context_ngram,
)
from based_jax.data.segments import LengthSegment
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL

SIZES = pytest.mark.parametrize(
    "vocab_size, seq_len, order", [(8, 60, 2), (3, 50, 3), (2, 40, 4), (5, 30, 1), (2, 2, 1)]
)


def read(row, vocab_size, order, concentration=0.1):
    """Yield at every position whether the context stood before, and the probabilities of what comes next."""
    followed, ended = collections.defaultdict(collections.Counter), set()
    for end in range(1, len(row) + 1):
        context = tuple(row[end - order + 1 : end]) if end >= order - 1 else None
        if end >= order:
            followed[tuple(row[end - order : end - 1])][row[end - 1]] += 1
        counts = followed[context] if context is not None else collections.Counter()
        total = sum(counts.values()) + vocab_size * concentration
        yield context in ended, [(counts[token] + concentration) / total for token in range(vocab_size)]
        if context is not None:
            ended.add(context)


@SIZES
def test_asked_is_the_next_token_where_its_context_stood_before(vocab_size, seq_len, order):
    inputs, labels = in_context_ngram(vocab_size, 40, seq_len, 4, order)
    for row, expected in zip(inputs.tolist(), labels.tolist(), strict=True):
        asked = [seen for seen, _ in read(row, vocab_size, order)]
        assert [label != NO_LABEL for label in expected] == asked
        known = zip(row[1:], expected[:-1], strict=True)
        assert all(label in (NO_LABEL, following) for following, label in known)


@SIZES
def test_best_predictions_equal_counting_by_hand(vocab_size, seq_len, order):
    inputs, _ = in_context_ngram(vocab_size, 40, seq_len, 5, order)
    best, probability = best_predictions(inputs, vocab_size, order)
    for row, own, certainty in zip(inputs.tolist(), best, probability, strict=True):
        for position, (_, chances) in enumerate(read(row, vocab_size, order)):
            assert own[position] == np.argmax(chances)
            assert certainty[position] == pytest.approx(max(chances))


@pytest.mark.parametrize("order, concentration", [(2, 0.1), (2, 1.0), (3, 0.3)])
def test_the_best_accuracy_is_reached_and_not_passed(order, concentration):
    examples = in_context_ngram(4, 2000, 64, 7, order, concentration)
    expected = best_accuracy(examples, 4, order, concentration)
    asked = examples[1] != NO_LABEL

    def accuracy(predictions):
        return (predictions == examples[1])[asked].mean()

    # The error of an answer has expectation 0 given the past: positions count as independent.
    sigma = np.sqrt(expected * (1 - expected) / asked.sum())
    assert abs(accuracy(best_predictions(examples[0], 4, order, concentration)[0]) - expected) < 4 * sigma
    unigram, _ = best_predictions(examples[0], 4, 1, concentration)
    assert accuracy(unigram) < expected - 0.02


def test_a_small_concentration_is_predictable_and_a_large_one_is_not():
    accuracies = [best_accuracy(in_context_ngram(4, 200, 64, 0, 2, c), 4, 2, c) for c in (0.001, 0.1, 1000.0)]
    assert accuracies[0] > 0.99 > accuracies[1] > 0.6 and accuracies[2] == pytest.approx(0.25, abs=0.01)


def test_every_row_has_a_language_of_its_own():
    inputs, _ = in_context_ngram(4, 20, 400, 0, 2, 0.05)
    following = [
        [np.bincount(row[1:][row[:-1] == token], minlength=4).argmax() for token in range(4)] for row in inputs
    ]
    assert len({tuple(row) for row in following}) > 10


def test_blocks_of_rows_change_the_draws_but_not_the_answers(monkeypatch):
    inputs, _ = in_context_ngram(4, 30, 20, 0)
    whole = best_predictions(inputs, 4)
    monkeypatch.setattr(module, "MAX_PROBABILITIES_PER_BLOCK", 7 * 16)
    for own, expected in zip(best_predictions(inputs, 4), whole, strict=True):
        np.testing.assert_array_equal(own, expected)
    cut, labels = in_context_ngram(4, 30, 20, 0)
    assert cut.shape == (30, 20) and len(np.unique(cut, axis=0)) > 20
    for row, expected in zip(cut.tolist(), labels.tolist(), strict=True):
        assert [seen for seen, _ in read(row, 4, 2)] == [label != NO_LABEL for label in expected]


def test_a_config_tells_the_best_accuracy_of_a_segment():
    tiny = PRESETS["tiny"]
    assert tiny.best_accuracy("test", 1) == best_accuracy(tiny.generate("test", 1), 4, 2, 0.1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 1}, "vocab_size 1"),
        ({"order": 0}, "order 0"),
        ({"order": 16}, "order 16 must be at least 1 and below seq_len 16"),
        ({"vocab_size": 1000, "order": 3}, "vocab_size 1000 to the power of order 3 must be at most 1048576"),
        ({"concentration": 0.0}, "concentration 0.0"),
        ({"test": (LengthSegment(1, 2),)}, "seq_len 2"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        InContextNgramConfig(**{"train": PRESETS["tiny"].train, "test": (), **changes})

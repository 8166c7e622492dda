import numpy as np
import pytest

from based_jax.evals.scores import contains, exact, f1, mean_of


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        (" Ann LEE, born 1970", ["ann lee"], (1, 2 * 2 / (4 + 2), 0)),
        ("The cat", ["a cat"], (0, 1, 1)),
        ("in Paris, France", ["London", "Paris"], (1, 2 * 1 / (3 + 1), 0)),
        ("$5.00 (net)", ["$5.00"], (1, 2 / 3, 0)),
        ("5000", ["$5.00"], (0, 0, 0)),
        ("to be to be", ["to be or not to be"], (0, 2 * 4 / (4 + 6), 0)),
        ("", ["x"], (0, 0, 0)),
        ("the", ["a"], (0, 1, 1)),
        ("a.c", ["abc"], (0, 0, 0)),
        ("abc", ["a.c"], (0, 0, 0)),
    ],
)
def test_scores_by_hand(said, answers, expected):
    assert (contains(said, answers), f1(said, answers), exact(said, answers)) == pytest.approx(expected)


def test_an_interval_covers_what_is_drawn_again(rng):
    values = (rng.random(400) < 0.3).astype(float)
    found = mean_of(values, list(map(str, range(400))))
    assert found.value == pytest.approx(values.mean())
    deviation = np.sqrt(found.value * (1 - found.value) / 400)
    assert found.low == pytest.approx(found.value - 1.96 * deviation, abs=0.01)
    assert found.high == pytest.approx(found.value + 1.96 * deviation, abs=0.01)


def test_examples_of_one_document_count_as_one(rng):
    """Four copies of each example in one group tell no more than one of them."""
    values = (rng.random(100) < 0.5).astype(float)
    one = mean_of(values, list(map(str, range(100))))
    copied = mean_of(np.repeat(values, 4), [str(x) for x in range(100) for _ in range(4)])
    assert (copied.low, copied.high) == pytest.approx((one.low, one.high))
    assert mean_of([1.0, 1.0], ["a", "b"]) == (1, 1, 1)

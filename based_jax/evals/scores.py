"""Scores of what a model says, from 0 to 1, and how sure a mean of them is."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
RESAMPLES, COVERED = 2000, 0.95


def contains(said: str, answers: Sequence[str]) -> float:
    """Return 1 if an answer stands in what is said, in upper or lower case, and else 0."""
    return float(any(re.search(re.escape(answer), said, re.IGNORECASE) for answer in answers))


def exact(said: str, answers: Sequence[str]) -> float:
    """Return 1 if what is said is an answer, but for case, punctuation, articles and white space, and else 0."""
    return float(any(_words(said) == _words(answer) for answer in answers))


def f1(said: str, answers: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, SQuAD's, of the answer that is nearest."""
    return max(_f1(_words(said), _words(answer)) for answer in answers)


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {"contains": contains, "f1": f1, "exact": exact}


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def _f1(said: list[str], answer: list[str]) -> float:
    if not said or not answer:
        return float(said == answer)
    return 2 * sum((Counter(said) & Counter(answer)).values()) / (len(said) + len(answer))


class Mean(NamedTuple):
    """A mean of scores, and the interval in which 95 % of resampled ones lie."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_of(values: Sequence[float], groups: Sequence[str], seed: int = 0) -> Mean:
    """Return the mean over examples with its bootstrap interval (percentiles), for which groups are drawn.

    Args:
      values: a score of each example.
      groups: of examples that are not independent, having a document in common.
      seed: of the draws.
    """
    places = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, counts = np.bincount(places, values), np.bincount(places)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES)
    means = drawn @ sums / (drawn @ counts)
    low, high = np.quantile(means, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return Mean(float(np.mean(values)), float(low), float(high))

"""Perplexity by slice: of tokens that a model can recall from what it read, of the others, and by what stands before.

A recalled token completes a pair of tokens that stands earlier in what is read, and that training had at most `rare`
times, so that it is not known otherwise: the "AR hits" of Zoology (Arora et al. 2023, section 3), which takes 1,250 of
the Pile. Each document is read by itself, from its first token on, in the windows of `likelihood.strided`.
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from based_jax.data.tokens import TokenStream
from based_jax.errors import UserError
from based_jax.evals.likelihood import Continuation, Judge, Judged, row_of, strided

RARE = 1250
BLOCK_TOKENS = 2**20
"""Of a stream that are held at once."""
WINDOWS_AT_ONCE = 512
ALL, RECALLED, OTHERS = "all", "recalled", "others"
Pairs = Int[np.ndarray, "N"]
"""Pairs of tokens as one number each, in ascending order."""


@dataclasses.dataclass(frozen=True)
class Slicing:
    """How documents are read, and which pairs are rare.

    Attributes:
      length: tokens of a window.
      stride: of them that are judged, but in a document's first window, which judges all.
      rare: the most times that training has a pair.

    Raises:
      UserError: a number is impossible.
    """

    length: int
    stride: int
    rare: int = RARE

    def __post_init__(self):
        if not 1 <= self.stride <= self.length:
            raise UserError(f"stride is {self.stride} and length {self.length}; they are 1 <= stride <= length.")
        if self.rare < 0:
            raise UserError(f"rare is {self.rare}; it is at least 0.")


def rare_pairs(
    validation: Iterable[Int[np.ndarray, "T"]], training: Iterable[Int[np.ndarray, "T"]], slicing: Slicing
) -> Pairs:
    """Return the pairs that stand in a window of what is judged twice or more, and rarely in training.

    Args:
      validation: the documents that are judged.
      training: the documents that pairs are counted in, in blocks of any size.
      slicing: how documents are read, and what is rare.
    """
    wanted = repeated_pairs(_windows(validation, slicing))
    return wanted[pair_counts(training, wanted) <= slicing.rare]


def slice_losses(
    judge: Judge,
    validation: Iterable[Int[np.ndarray, "T"]],
    rare: Pairs,
    slicing: Slicing,
    told: Callable[[int], None] = lambda tokens: None,
) -> pd.DataFrame:
    """Return a row for each slice: "slice", "tokens", "loss" in nats a token, "perplexity" and "accuracy".

    Slices: all tokens, those that are recalled, the others, and those behind 1, 2 to 3, 4 to 7, ... tokens of a window.

    Args:
      judge: the model.
      validation: the documents that are judged.
      rare: pairs of theirs that are not known otherwise, see `rare_pairs`.
      slicing: how documents are read.
      told: is called with the number of judged tokens so far.

    Raises:
      UserError: there is no token to judge.
    """
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for found in itertools.batched(_windows(validation, slicing), WINDOWS_AT_ONCE):
        for place, judged in judge.judged([row_of(window) for window in found]):
            _add(sums, found[place], judged, rare)
        told(int(sums[ALL][0]))
    if not sums[ALL][0]:
        raise UserError("There is no token to judge; a document has at least two.")
    return pd.DataFrame([_line(name, *sums[name]) for name in sorted(sums, key=_order)])


def _windows(texts: Iterable[Int[np.ndarray, "T"]], slicing: Slicing) -> Iterator[Continuation]:
    return itertools.chain.from_iterable(strided(tokens, slicing.length, slicing.stride) for tokens in texts)


def documents(stream: TokenStream, end_of_text: int) -> Iterator[Int[np.ndarray, "T"]]:
    """Yield the tokens of each document, its end of text the last."""
    rest = np.zeros(0, np.int32)
    for start in range(0, len(stream), BLOCK_TOKENS):
        tokens = np.concatenate([rest, stream.read(start, start + BLOCK_TOKENS)])
        *whole, rest = np.split(tokens, 1 + np.flatnonzero(tokens == end_of_text))
        yield from whole
    if len(rest):
        yield rest


def blocks(stream: TokenStream) -> Iterator[Int[np.ndarray, "T"]]:
    """Yield the tokens of a stream in blocks, each but the last with the first token of the next at its end."""
    for start in range(0, len(stream), BLOCK_TOKENS):
        yield stream.read(start, start + BLOCK_TOKENS + 1)


def pairs_of(tokens: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T-1"]:
    """Return each token but the first with that before it, as one number."""
    wide = tokens.astype(np.int64)
    return (wide[:-1] << 32) | wide[1:]


def is_repeated(tokens: Int[np.ndarray, "T"]) -> Bool[np.ndarray, "T-1"]:
    """Return whether the pair that each token but the first completes stands earlier."""
    pairs = pairs_of(tokens)
    _, first, place = np.unique(pairs, return_index=True, return_inverse=True)
    return first[place] < np.arange(len(pairs))


def repeated_pairs(found: Iterable[Continuation]) -> Pairs:
    """Return all pairs that stand in a window twice or more."""
    pairs = [np.zeros(0, np.int64)]
    for context, ids in found:
        tokens = np.concatenate([context, ids])
        pairs.append(np.unique(pairs_of(tokens)[is_repeated(tokens)]))
    return np.unique(np.concatenate(pairs))


def pair_counts(texts: Iterable[Int[np.ndarray, "T"]], wanted: Pairs) -> Int[np.ndarray, "N"]:
    """Return how often each pair stands in texts."""
    counts = np.zeros(len(wanted), np.int64)
    for tokens in texts if len(wanted) else ():
        pairs = pairs_of(tokens)
        places = np.minimum(np.searchsorted(wanted, pairs), len(wanted) - 1)
        counts += np.bincount(places[wanted[places] == pairs], minlength=len(wanted))
    return counts


def _add(sums: dict[str, np.ndarray], window: Continuation, judged: Judged, rare: Pairs) -> None:
    """Add the tokens, losses and right answers of a window to the sums of each slice."""
    tokens = np.concatenate([window.context, window.ids])
    asked = np.arange(len(tokens) - 1) >= len(window.context) - 1
    recalled = is_repeated(tokens) & np.isin(pairs_of(tokens), rare)
    before = np.log2(np.arange(1, len(tokens))).astype(int)
    slices = {ALL: asked, RECALLED: asked & recalled, OTHERS: asked & ~recalled}
    slices |= {str(power): asked & (before == power) for power in np.unique(before[asked])}
    for name, chosen in slices.items():
        sums[name] += (chosen.sum(), judged.losses[chosen].sum(dtype=np.float64), judged.correct[chosen].sum())


def _line(name: str, tokens: float, loss: float, correct: float) -> dict[str, float | str]:
    mean = loss / tokens if tokens else math.nan
    return {
        "slice": _title(name),
        "tokens": int(tokens),
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": correct / tokens if tokens else math.nan,
    }


def _title(name: str) -> str:
    """Return a slice as a table calls it."""
    if not name.isdigit():
        return name
    least, most = 2 ** int(name), 2 ** (int(name) + 1) - 1
    return "behind 1 token" if most == 1 else f"behind {least:,} to {most:,} tokens"


def _order(name: str) -> int:
    return int(name) if name.isdigit() else [ALL, RECALLED, OTHERS].index(name) - 3

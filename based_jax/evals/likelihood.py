"""How likely a model finds texts behind others: batches of like lengths, of as many tokens each."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from based_jax.errors import UserError
from based_jax.labels import NO_LABEL
from based_jax.nn.lm import LM

LEAST_LENGTH = 64
"""Of a batch: lengths are powers of two from here on, so that few programs are compiled."""
BATCH_TOKENS = 16_384


class Continuation(NamedTuple):
    """Ids that are judged, behind at least one that is not."""

    context: Sequence[int] | np.ndarray
    ids: Sequence[int] | np.ndarray


class Likelihood(NamedTuple):
    """The log-probability of a continuation in nats, and whether no token of it has a likelier one in its place."""

    log_prob: float
    is_greedy: bool


class Judged(NamedTuple):
    """What is known of the tokens of one row: losses in nats, and whether no other token was likelier."""

    losses: Float[np.ndarray, "T"]
    correct: Bool[np.ndarray, "T"]


class Judge:
    """A model that reads rows of any lengths, and says how likely each labelled token was.

    Args:
      model: the language model.
      batch_tokens: read together, padding included; a longer row is read alone.

    Raises:
      UserError: `batch_tokens` is below 1.
    """

    def __init__(self, model: LM, batch_tokens: int = BATCH_TOKENS):
        if batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}; it is at least 1.")
        self.config, self.max_len, self._batch_tokens = model.config, model.max_len, batch_tokens
        self._graphdef, self._params = nnx.split(model)

    def judged(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[int, Judged]]:
        """Yield the place of each row with what is known of it, the longest rows first.

        Args:
          rows: inputs and labels (T,), a label NO_LABEL where nothing is asked.

        Raises:
          UserError: an id that the model does not know, as of another tokenizer.
        """
        self._check_ids(rows)
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
        while order:
            length = _padded(len(rows[order[0]][0]))
            size = max(self._batch_tokens // length, 1)
            places, order = order[:size], order[size:]
            losses, correct = self._read([rows[place] for place in places], size, length)
            for row, place in enumerate(places):
                shown = slice(len(rows[place][0]))
                yield place, Judged(losses[row, shown], correct[row, shown])

    def _check_ids(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        for place, row in enumerate(rows):
            if (most := max(int(ids.max(initial=0)) for ids in row)) >= self.config.vocab_size:
                raise UserError(f"Row {place} has id {most}; the model knows ids 0 to {self.config.vocab_size - 1}.")

    def _read(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], size: int, length: int):
        inputs, segment_ids = np.zeros((2, size, length), np.int32)
        labels = np.full((size, length), NO_LABEL, np.int32)
        for row, (ids, asked) in enumerate(rows):
            inputs[row, : len(ids)], segment_ids[row, : len(ids)], labels[row, : len(ids)] = ids, 1, asked
        return jax.device_get(_losses(self._graphdef, self._params, inputs, labels, segment_ids))


@functools.partial(jax.jit, static_argnums=0)
def _losses(graphdef: nnx.GraphDef, params: nnx.State, inputs, labels, segment_ids):
    model = nnx.merge(graphdef, params)
    return model.cross_entropy(model.hidden(inputs, segment_ids), labels)


def likelihoods(
    judge: Judge, continuations: Sequence[Continuation], max_length: int
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the place of each continuation with its likelihood; of what is too long the beginning is left out.

    Args:
      judge: the model.
      continuations: ids, and what they stand behind.
      max_length: tokens that are read of each.

    Raises:
      UserError: a continuation or its context is empty, or a continuation is longer than what is read.
    """
    for place, (context, ids) in enumerate(continuations):
        if not len(context) or not len(ids):
            raise UserError(f"Continuation {place} has {len(ids)} ids behind {len(context)}; both are at least 1.")
        if len(ids) > max_length:
            raise UserError(f"Continuation {place} has {len(ids)} ids; the model reads {max_length}.")
    rows = [row_of(continuation, max_length) for continuation in continuations]
    for place, (losses, correct) in judge.judged(rows):
        asked = rows[place][1] != NO_LABEL
        yield place, Likelihood(-float(losses.sum(dtype=np.float64)), bool(correct[asked].all()))


def strided(tokens: Sequence[int] | np.ndarray, length: int, stride: int | None = None) -> Iterator[Continuation]:
    """Yield windows that judge each token but the first once, each behind as much as there is room for.

    Args:
      tokens: of a text, behind one that is not judged.
      length: tokens that are read of a window.
      stride: of them that are judged, but in the first window, which judges all; by default as many as are read.
    """
    stop = min(len(tokens), length + 1)
    if stop > 1:
        yield Continuation(tokens[:1], tokens[1:stop])
    while stop < len(tokens):
        start, stop = stop, min(stop + (stride or length), len(tokens))
        yield Continuation(tokens[max(stop - 1 - length, 0) : start], tokens[start:stop])


def row_of(continuation: Continuation, max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and the labels (T,) of a continuation, of which the last `max_length` are read."""
    context, ids = continuation
    tokens = np.concatenate([context, ids]).astype(np.int32)
    tokens = tokens if max_length is None else tokens[-(max_length + 1) :]
    asked = np.arange(len(tokens) - 1) >= len(tokens) - 1 - len(ids)
    return tokens[:-1], np.where(asked, tokens[1:], NO_LABEL).astype(np.int32)


def _padded(length: int) -> int:
    return 1 << (max(length, LEAST_LENGTH) - 1).bit_length()

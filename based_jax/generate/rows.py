"""Sequences that are decoded together, each with its own length, end and draws."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from based_jax.generate.decoder import Caches, Decoder
from based_jax.generate.drafts import Drafts
from based_jax.generate.prefill import prefill
from based_jax.generate.requests import MOST_STOP_IDS, Request
from based_jax.generate.sampling import Draws
from based_jax.generate.state import State
from based_jax.generate.state_layout import StateLayout, with_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B sequences between two tokens; the leading axis of every array is the rows'.

    A row that has stopped is computed on, since all go together, and nothing of it is read.

    Attributes:
      caches: of each layer, after all tokens but the newest.
      token: the newest token, which no layer has read yet.
      length: tokens of the sequence, the newest among them.
      left: tokens that may still be drawn, 0 of a row that has stopped.
      stop_ids: what ends the row once it is drawn, -1 for none.
      draws: how the next token is drawn.
      drafting: what drafts keep of the text (`drafts.Method`); None where nothing is drafted.
    """

    caches: Caches
    token: Int[Array, "B"]
    length: Int[Array, "B"]
    left: Int[Array, "B"]
    stop_ids: Int[Array, "B S"]
    draws: Draws
    drafting: Any = None

    @classmethod
    def of(cls, caches: Caches, requests: Sequence[Request], drafting: Any = None) -> "Rows":
        """Return the rows of requests, whose caches have read all of the prompts but their last tokens."""
        stops = np.full((len(requests), MOST_STOP_IDS), -1, np.int32)
        for row, request in enumerate(requests):
            stops[row, : len(request.stop_ids)] = request.stop_ids
        numbers = np.asarray(
            [(request.prompt[-1], request.length, request.max_new_tokens) for request in requests], np.int32
        ).T
        samplings, words = [request.sampling for request in requests], [request.draw_words for request in requests]
        draws = Draws.of(samplings, words, [request.top_log_probs > 0 for request in requests])
        token, length, left, stop_ids = _on_device(*numbers, stops)
        return cls(caches, token, length, left, stop_ids, draws, drafting)

    @classmethod
    def stopped(cls, decoder: Decoder, count: int, max_len: int, drafts: Drafts | None = None) -> "Rows":
        """Return rows that have all stopped, with caches for `max_len` tokens."""
        requests = [Request([0])] * count
        drafting = None if drafts is None else drafts.begun(requests, max_len)
        rows = cls.of(decoder.init_cache(count, max_len), requests, drafting)
        return dataclasses.replace(rows, left=jnp.zeros(count, jnp.int32))

    @property
    def live(self) -> Bool[Array, "B"]:
        """Which rows have not stopped."""
        return self.left > 0

    def with_rows(self, slots: Int[np.ndarray, "R"], others: "Rows") -> "Rows":
        """Return the rows with R others at slots of their own, or at none where the slot is too large.

        These are used up.
        """
        return _with_rows(self, slots, others)

    def with_state(self, slot: int, state: State, others: "Rows") -> "Rows":
        """Return the rows with the first of others, without caches, at a slot, where it goes on from a state.

        These are used up.
        """
        return _with_state(self, np.int32(slot), dict(state.arrays), others)

    def without_row(self, slot: int) -> "Rows":
        """Return the rows of which that at a slot has stopped; these are used up."""
        return _without_row(self, np.int32(slot))


def begun(
    decoder: Decoder,
    requests: Sequence[Request],
    max_len: int,
    chunk_tokens: int | None = None,
    drafts: Drafts | None = None,
) -> Rows:
    """Return the rows of requests whose prompts are read together, with caches for `max_len` tokens each."""
    prompts = [np.asarray(request.prompt[:-1], np.int32) for request in requests]
    caches = _caches_before(decoder, requests, max_len)
    drafting = None if drafts is None else drafts.begun(requests, max_len)
    return Rows.of(prefill(decoder, caches, prompts, chunk_tokens), requests, drafting)


def _caches_before(decoder: Decoder, requests: Sequence[Request], max_len: int) -> Caches:
    """Return the caches before the prompts: those of what the requests go on from, or empty ones."""
    if all(request.state is None for request in requests):
        return decoder.init_cache(len(requests), max_len)
    layout = StateLayout(decoder)
    states = [request.state for request in requests]
    rows = [decoder.init_cache(1, max_len) if state is None else layout.fork(state, max_len) for state in states]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


@jax.jit
def _on_device(*numbers: Array) -> tuple[Array, ...]:
    """Return numbers that are on the host, by one program: copies of each by itself would wait for each other."""
    return numbers


@functools.partial(jax.jit, donate_argnums=0)
def _with_rows(rows: Rows, slots: Int[Array, "R"], others: Rows) -> Rows:
    return jax.tree.map(lambda x, y: x.at[slots].set(y, mode="drop", unique_indices=True), rows, others)


@functools.partial(jax.jit, donate_argnums=0)
def _with_state(rows: Rows, slot: Int[Array, ""], arrays: dict[str, Array], others: Rows) -> Rows:
    rest = dataclasses.replace(rows, caches=())
    rest = jax.tree.map(lambda x, y: x.at[slot].set(y[0]), rest, others)
    return dataclasses.replace(rest, caches=with_state(rows.caches, slot, arrays))


@functools.partial(jax.jit, donate_argnums=0)
def _without_row(rows: Rows, slot: Int[Array, ""]) -> Rows:
    return dataclasses.replace(rows, left=rows.left.at[slot].set(0))

"""Sequences that are decoded together, each with its own length, end and draws, and the loop that goes on with them."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from based_jax import parallel
from based_jax.dims import BD
from based_jax.generate.decoder import Caches, Decoder, Layout
from based_jax.generate.prefill import prefill
from based_jax.generate.requests import MOST_STOP_IDS, Request
from based_jax.generate.sampling import Drawn, Draws, draw
from based_jax.generate.state_layout import StateLayout
from based_jax.nn.lm import LM
from based_jax.ops.dispatch import target_platform

GRAPH_OPTIONS = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
"""With which XLA makes one CUDA graph of a loop, whose end the GPU finds itself, and kernels that need nothing of each
other run side by side."""


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
    """

    caches: Caches
    token: Int[Array, "B"]
    length: Int[Array, "B"]
    left: Int[Array, "B"]
    stop_ids: Int[Array, "B S"]
    draws: Draws

    @classmethod
    def of(cls, caches: Caches, requests: Sequence[Request]) -> "Rows":
        """Return the rows of requests, whose caches have read all of the prompts but their last tokens."""
        stop_ids = np.full((len(requests), MOST_STOP_IDS), -1, np.int32)
        for row, request in enumerate(requests):
            stop_ids[row, : len(request.stop_ids)] = request.stop_ids
        token, length, left = np.asarray(
            [(request.prompt[-1], request.length, request.max_new_tokens) for request in requests], np.int32
        ).T
        samplings, words = [request.sampling for request in requests], [request.draw_words for request in requests]
        draws = Draws.of(samplings, words, [request.top_log_probs > 0 for request in requests])
        token, length, left, stop_ids = jax.device_put((token, length, left, stop_ids))
        return cls(caches, token, length, left, stop_ids, draws)

    @classmethod
    def stopped(cls, decoder: Decoder, count: int, max_len: int) -> "Rows":
        """Return rows that have all stopped, with caches for `max_len` tokens."""
        rows = cls.of(decoder.init_cache(count, max_len), [Request([0])] * count)
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

    def without_row(self, slot: int) -> "Rows":
        """Return the rows of which that at a slot has stopped; these are used up."""
        return _without_row(self, np.int32(slot))


class Block(NamedTuple):
    """What a number of decode steps have drawn.

    Attributes:
      tokens: of each row, the first `drawn` of which are drawn; an id that stops the row is its last.
      log_probs: of these tokens, by the model's own distribution: at temperature 1, and with nothing cut.
      top_tokens, top_log_probs: of the likeliest tokens there, as of `Drawn`.
      drawn: tokens of each row, fewer than the steps if it has stopped.
    """

    tokens: Int[Array, "B steps"]
    log_probs: Float[Array, "B steps"]
    top_tokens: Int[Array, "B steps N"]
    top_log_probs: Float[Array, "B steps N"]
    drawn: Int[Array, "B"]


def begun(decoder: Decoder, requests: Sequence[Request], max_len: int, chunk_tokens: int | None = None) -> Rows:
    """Return the rows of requests whose prompts are read together, with caches for `max_len` tokens each."""
    prompts = [np.asarray(request.prompt[:-1], np.int32) for request in requests]
    caches = _caches_before(decoder, requests, max_len)
    return Rows.of(prefill(decoder, caches, prompts, chunk_tokens), requests)


def _caches_before(decoder: Decoder, requests: Sequence[Request], max_len: int) -> Caches:
    """Return the caches before the prompts: those of what the requests go on from, or empty ones."""
    if all(request.state is None for request in requests):
        return decoder.init_cache(len(requests), max_len)
    layout = StateLayout(decoder)
    states = [request.state for request in requests]
    rows = [decoder.init_cache(1, max_len) if state is None else layout.fork(state, max_len) for state in states]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def decode(decoder: Decoder, rows: Rows, steps: int, most: int | None = None) -> tuple[Rows, Block]:
    """Draw up to `steps` tokens of each row in one program, or fewer, `most`; it ends when all rows have stopped.

    The rows given are used up: their caches are written in place.
    """
    loop = decoding_loop if loop_options() is None else graph_loop
    return loop(decoder.layout, steps, decoder.params, rows, np.int32(steps if most is None else most))


def loop_options() -> dict[str, str] | None:
    """Return what XLA is told besides for the program of `decode`, None unless it is one GPU's."""
    is_one_gpu = target_platform() == "cuda" and jax.sharding.get_abstract_mesh().size <= 1
    return GRAPH_OPTIONS if is_one_gpu else None


def blocks(decoder: Decoder, rows: Rows, steps: int) -> Iterator[Block]:
    """Yield blocks (numpy) until all rows have stopped; while one is read the next is computed."""
    rows, ahead = decode(decoder, rows, steps)
    goes_on = True
    while goes_on:
        block = ahead
        rows, ahead = decode(decoder, rows, steps)
        block = jax.device_get(block)
        goes_on = bool((block.drawn == steps).any())
        yield block


def decode_step(model: LM, rows: Rows) -> tuple[Rows, Drawn]:
    """Read the newest token of each row; return the rows with one more, and that."""
    hidden, caches = model.step(rows.token, rows.caches)
    drawn = draw(_logits(model, hidden), rows.draws.of_live(rows.live), rows.length)
    stops = jnp.any(drawn.token[:, None] == rows.stop_ids, axis=1)
    after = dataclasses.replace(
        rows,
        caches=caches,
        token=jnp.where(rows.live, drawn.token, rows.token),
        length=rows.length + rows.live,
        left=jnp.where(rows.live & ~stops, rows.left - 1, 0),
    )
    return after, drawn


def _drawn_until_all_stop(
    layout: Layout, steps: int, params: nnx.State, rows: Rows, most: Int[Array, ""]
) -> tuple[Rows, Block]:
    """Draw tokens as `decode` does, of a model of a layout."""
    model = layout.model(params)

    def goes_on(carry):
        i, rows, *_ = carry
        return (i < most) & jnp.any(rows.live)

    def step(carry):
        i, rows, found, count = carry
        after, drawn = decode_step(model, rows)
        return i + 1, after, jax.tree.map(lambda xs, x: xs.at[i].set(x), found, drawn), count + rows.live

    empty = Drawn.zeros((steps, len(rows.token)), layout.config.padded_vocab_size)
    start = jnp.int32(0), rows, empty, jnp.zeros_like(rows.left)
    _, rows, found, count = jax.lax.while_loop(goes_on, step, start)
    found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
    block = Block(found.token, found.log_prob, found.top_tokens, found.top_log_probs, count)
    return rows, jax.tree.map(parallel.constrain, block)


_loop = functools.partial(jax.jit, _drawn_until_all_stop, static_argnums=(0, 1), donate_argnums=3)
decoding_loop, graph_loop = _loop(), _loop(compiler_options=GRAPH_OPTIONS)
"""The compiled program of `decode`, as it is and as one CUDA graph."""


def _logits(model: LM, hidden: BD) -> Float[Array, "B vocab"]:
    """Return logits of which those of the padded vocabulary are never drawn."""
    logits = model.logits(hidden)
    return jnp.where(jnp.arange(logits.shape[-1]) < model.config.vocab_size, logits, -jnp.inf)


@functools.partial(jax.jit, donate_argnums=0)
def _with_rows(rows: Rows, slots: Int[Array, "R"], others: Rows) -> Rows:
    return jax.tree.map(lambda x, y: x.at[slots].set(y, mode="drop", unique_indices=True), rows, others)


@functools.partial(jax.jit, donate_argnums=0)
def _without_row(rows: Rows, slot: Int[Array, ""]) -> Rows:
    return dataclasses.replace(rows, left=rows.left.at[slot].set(0))

"""The loop that goes on with rows, and what it draws."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from based_jax import parallel
from based_jax.generate.decoder import Decoder, Layout, Params, compile_ahead
from based_jax.generate.drafts import Drafts, Method
from based_jax.generate.rows import Rows
from based_jax.generate.sampling import Drawn, draw, drawable
from based_jax.generate.verification import Verified, verify
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


class Block(NamedTuple):
    """What a number of decode steps have drawn, T of each row at most.

    Attributes:
      tokens: of each row, the first `drawn` of which are drawn; an id that stops the row is its last.
      log_probs: of these tokens, by the model's own distribution: at temperature 1, and with nothing cut.
      top_tokens, top_log_probs: of the likeliest tokens there, as of `Drawn`.
      drawn: tokens of each row.
      steps: in which they were drawn, fewer than all if the row has stopped.
      offered: drafted tokens that were verified in these steps; all but one token of a step were drafted.
    """

    tokens: Int[Array, "B T"]
    log_probs: Float[Array, "B T"]
    top_tokens: Int[Array, "B T N"]
    top_log_probs: Float[Array, "B T N"]
    drawn: Int[Array, "B"]
    steps: Int[Array, "B"]
    offered: Int[Array, "B"]


def decode(
    decoder: Decoder, rows: Rows, steps: int, most: int | None = None, drafts: Drafts | None = None
) -> tuple[Rows, Block]:
    """Take up to `steps` steps of each row in one program, or fewer, `most`; it ends when all rows have stopped.

    A step draws one token, and with drafts as many more as prove right. The rows given are used up: their caches are
    written in place.
    """
    limit = np.int32(steps if most is None else most)
    with decoder.running():
        loop, *arguments = _loop(decoder, steps, drafts)
        return loop(*arguments, rows, limit)


def compile_block(decoder: Decoder, rows: Any, steps: int, drafts: Drafts | None = None) -> None:
    """Compile the program of `decode` on one device, of whose rows the shapes are enough."""
    loop, *arguments = _loop(decoder, steps, drafts)
    compile_ahead(loop, *arguments, rows, np.int32(steps))


def _loop(decoder: Decoder, steps: int, drafts: Drafts | None) -> tuple[Any, ...]:
    """Return the program of `decode`, and what it is called with before the rows."""
    as_graph = loop_options() is not None
    if drafts is None:
        return decoding_graph if as_graph else decoding_loop, decoder.layout, steps, decoder.params
    loop = verifying_graph if as_graph else verifying_loop
    return loop, decoder.layout, drafts.method, steps, decoder.params, drafts.params


def decode_within(decoder: Decoder, rows: Rows, steps: int, drafts: Drafts | None = None) -> tuple[Rows, Block]:
    """Take steps as `decode` does, as a part of a program, which is compiled with `loop_options`."""
    if drafts is None:
        return decoding_loop(decoder.layout, steps, decoder.params, rows, np.int32(steps))
    return verifying_loop(decoder.layout, drafts.method, steps, decoder.params, drafts.params, rows, np.int32(steps))


def loop_options() -> dict[str, str] | None:
    """Return what XLA is told besides for the program of `decode`, None unless it is one GPU's."""
    is_one_gpu = target_platform() == "cuda" and jax.sharding.get_abstract_mesh().size <= 1
    return GRAPH_OPTIONS if is_one_gpu else None


def blocks(decoder: Decoder, rows: Rows, steps: int, drafts: Drafts | None = None) -> Iterator[Block]:
    """Yield blocks (numpy) until all rows have stopped; while one is read the next is computed."""
    rows, ahead = decode(decoder, rows, steps, drafts=drafts)
    goes_on = True
    while goes_on:
        block = ahead
        rows, ahead = decode(decoder, rows, steps, drafts=drafts)
        block = jax.device_get(block)
        goes_on = bool((block.steps == steps).any())
        yield block


def decode_step(model: LM, rows: Rows) -> tuple[Rows, Drawn]:
    """Read the newest token of each row; return the rows with one more, and that."""
    hidden, caches = model.step(rows.token, rows.caches)
    drawn = draw(drawable(model, hidden), rows.draws.of_live(rows.live), rows.length)
    stops = jnp.any(drawn.token[:, None] == rows.stop_ids, axis=1)
    after = dataclasses.replace(
        rows,
        caches=caches,
        token=jnp.where(rows.live, drawn.token, rows.token),
        length=rows.length + rows.live,
        left=jnp.where(rows.live & ~stops, rows.left - 1, 0),
    )
    return after, drawn


def _drawn(layout: Layout, steps: int, params: Params, rows: Rows, most: Int[Array, ""]) -> tuple[Rows, Block]:
    """Draw tokens as `decode` does without drafts, of a model of a layout."""
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
    block = Block._make([*found, count, count, jnp.zeros_like(count)])
    return rows, jax.tree.map(parallel.constrain, block)


def _verified(
    layout: Layout, method: Method, steps: int, params: Params, draft_params: Any, rows: Rows, most: Int[Array, ""]
) -> tuple[Rows, Block]:
    """Draw tokens as `decode` does with drafts; rows have different numbers of them."""
    model, B = layout.model(params), len(rows.token)
    T = steps * (method.tokens + 1)

    def goes_on(carry):
        i, rows, _ = carry
        return (i < most) & jnp.any(rows.live)

    def step(carry):
        i, rows, block = carry
        after, new = verify(model, method, draft_params, rows)
        return i + 1, after, _with_new(block, new, rows.live)

    none = jnp.zeros(B, jnp.int32)
    block = Block._make([*Drawn.zeros((B, T), layout.config.padded_vocab_size), none, none, none])
    _, rows, block = jax.lax.while_loop(goes_on, step, (jnp.int32(0), rows, block))
    return rows, jax.tree.map(parallel.constrain, block)


_decoding = functools.partial(jax.jit, _drawn, static_argnums=(0, 1), donate_argnums=3)
_verifying = functools.partial(jax.jit, _verified, static_argnums=(0, 1, 2), donate_argnums=5)
decoding_loop, verifying_loop = _decoding(), _verifying()
decoding_graph, verifying_graph = (loop(compiler_options=GRAPH_OPTIONS) for loop in (_decoding, _verifying))


def _with_new(block: Block, new: Verified, live: Bool[Array, "B"]) -> Block:
    """Return a block with the new tokens of each row behind those that it has."""
    T, place = block.tokens.shape[1], jnp.arange(new.drawn.token.shape[1])[None]
    places = jnp.where(place < new.counts[:, None], block.drawn[:, None] + place, T)
    write = jax.vmap(lambda old, places, new: old.at[places].set(new, mode="drop"))
    drawn = [write(old, places, x) for old, x in zip(block, new.drawn, strict=False)]
    return Block._make([*drawn, block.drawn + new.counts, block.steps + live, block.offered + new.offered])

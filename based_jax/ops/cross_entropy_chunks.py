"""Cross-entropy of a linear layer by tiles of its logits: a block of rows and a chunk of the vocabulary at a time.

Both passes make a tile's logits from hidden states and the table. The gradient of the table is one array, to which each
block of rows adds. Under a mesh a device has its own rows and, where the table lies over `tensor`, its own part of the
vocabulary: devices exchange three numbers a row forward, and the gradients' sums backward.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from based_jax.ops import sharded
from based_jax.ops.calls import Correct, CrossEntropyCall, Losses, Rows, Table
from based_jax.ops.precision import einsum, product_policy

BLOCK_ROWS, CHUNK_TOKENS = 4096, 2048
"""The most rows and tokens of a tile of logits."""
LOWEST = float(jnp.finfo(jnp.float32).min)
ROWS, TABLE = ("tokens",), ("vocab",)


def supports(_call: CrossEntropyCall) -> str | None:
    """Return why no call can run here, or None."""
    return sharded.mesh_refusal()


def logits_bytes(call: CrossEntropyCall) -> int:
    """Return the bytes of a device's logits in fp32."""
    rows = sharded.part_of_device("tokens", call.hidden.shape[0])
    return 4 * rows * sharded.part_of_device("vocab", call.table.shape[0])


def compute(call: CrossEntropyCall) -> tuple[Losses, Correct]:
    """Return losses, and whether no token has a larger logit than the label."""
    return _by_tiles(*sharded.vary_alike(*call))


@jax.custom_vjp
def _by_tiles(hidden: Rows, table: Table, labels: Int[Array, "N"]) -> tuple[Losses, Correct]:
    return _by_tiles_fwd(hidden, table, labels)[0]


def _by_tiles_fwd(hidden, table, labels):
    axes = sharded.axes_of("vocab", table.shape[0])

    def on_device(hidden, table, labels):
        own = labels - _first_token(table, axes)
        top, total, chosen = _by_blocks(lambda h, label: _statistics(h, table, label), hidden, own)
        highest = lax.pmax(top, axes)
        total, chosen = lax.psum((total * jnp.exp(top - highest), chosen), axes)
        logarithm = jnp.log(total)
        return logarithm + (highest - chosen), chosen >= highest, highest, logarithm

    arrays, names = (hidden, _carried(table, hidden), labels), (ROWS, TABLE, ROWS)
    *results, highest, logarithm = sharded.per_shard(on_device, arrays, names, (ROWS,) * 4)
    return tuple(results), (hidden, table, labels, highest, logarithm)


def _by_tiles_bwd(saved, cotangents):
    hidden, table, labels, *statistics = saved
    axes, row_axes = sharded.axes_of("vocab", table.shape[0]), sharded.axes_of("tokens", hidden.shape[0])

    def on_device(hidden, table, labels, *rest):
        rows = hidden, labels - _first_token(table, axes), *rest
        dhidden, dtable = _gradients(table, rows)
        return lax.psum(dhidden, axes), lax.psum(dtable, row_axes)

    arrays = hidden, _carried(table, hidden), labels, *statistics, cotangents[0]
    names = ROWS, TABLE, ROWS, ROWS, ROWS, ROWS
    dhidden, dtable = sharded.per_shard(on_device, arrays, names, (ROWS, TABLE))
    return dhidden.astype(hidden.dtype), dtable.astype(table.dtype), None


_by_tiles.defvjp(_by_tiles_fwd, _by_tiles_bwd)


class Tile(NamedTuple):
    """The logits (N, C) of rows and a chunk of the table (C, D), its first token, and which tokens are met first here.

    The last chunk begins early where the vocabulary is no multiple of a chunk.
    """

    logits: Float[Array, "N C"]
    chunk: Float[Array, "C D"]
    start: Int[Array, ""]
    labelled: Bool[Array, "N C"]
    fresh: Bool[Array, "1 C"]


def _tile(hidden: Float[Array, "N D"], table: Table, labels: Int[Array, "N"], number: Int[Array, ""]) -> Tile:
    dtype, precision = product_policy(hidden.dtype)
    vocab, width = table.shape[0], min(CHUNK_TOKENS, table.shape[0])
    start = jnp.minimum(number * width, vocab - width)
    chunk = lax.dynamic_slice_in_dim(table, start, width).astype(hidden.dtype).astype(dtype)
    tokens = start + jnp.arange(width)[None]
    logits, fresh = einsum("nd,vd->nv", hidden.astype(dtype), chunk, precision), tokens >= number * width
    return Tile(logits, chunk, start, fresh & (tokens == labels[:, None]), fresh)


def _chunks(table: Table) -> Int[Array, "_"]:
    return jnp.arange(-(-table.shape[0] // CHUNK_TOKENS), dtype=jnp.int32)


def _statistics(hidden, table, labels):
    """Return each row's largest logit, the sum of exponentials relative to it, and the label's logit."""

    def add(sums, number):
        top, total, chosen = sums
        tile = _tile(hidden, table, labels, number)
        logits = jnp.where(tile.fresh, tile.logits, LOWEST)
        higher = jnp.maximum(top, logits.max(axis=1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[:, None]).sum(axis=1)
        return (higher, total, chosen + jnp.where(tile.labelled, logits, 0.0).sum(axis=1)), None

    zeros = jnp.zeros(labels.shape, jnp.float32)
    start = tuple(sharded.vary_alike(zeros + LOWEST, zeros, zeros, like=(hidden, table, labels)))
    return lax.scan(add, start, _chunks(table))[0]


def _gradients(table: Table, rows: tuple[Array, ...]) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """Return the gradients of hidden rows, from their own part of the vocabulary, and of the table from all rows."""
    hidden = rows[0]
    dtype, precision = product_policy(hidden.dtype)

    def of_block(dtable, block):
        h, labels, highest, logarithm, factor = block

        def of_tile(sums, number):
            dh, dtable = sums
            tile = _tile(h, table, labels, number)
            p = jnp.exp((tile.logits - highest[:, None]) - logarithm[:, None])
            dlogits = jnp.where(tile.fresh, jnp.where(tile.labelled, p - 1.0, p) * factor[:, None], 0.0)
            dlogits = dlogits.astype(h.dtype).astype(dtype)
            more = einsum("nv,nd->vd", dlogits, h.astype(dtype), precision)
            more = more + lax.dynamic_slice_in_dim(dtable, tile.start, more.shape[0])
            dtable = lax.dynamic_update_slice_in_dim(dtable, more, tile.start, axis=0)
            return (dh + einsum("nv,vd->nd", dlogits, tile.chunk, precision), dtable), None

        [zeros] = sharded.vary_alike(jnp.zeros(h.shape, jnp.float32), like=(table, *rows))
        (dh, dtable), _ = lax.scan(of_tile, (zeros, dtable), _chunks(table))
        return dtable, dh.astype(h.dtype)

    [zeros] = sharded.vary_alike(jnp.zeros(table.shape, jnp.float32), like=(table, *rows))
    dtable, dhidden = lax.scan(of_block, zeros, tuple(map(_blocks, rows)))
    return dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], dtable


def _by_blocks(function: Callable, *rows: Array) -> list[Array]:
    """Return what a function of blocks of rows returns for all rows."""
    results = lax.map(lambda block: function(*block), tuple(map(_blocks, rows)))
    return [x.reshape(-1)[: rows[0].shape[0]] for x in results]


def _blocks(x: Array) -> Array:
    """Cut rows into blocks of the same size, filled up with zeros."""
    count = max(-(-x.shape[0] // BLOCK_ROWS), 1)
    filled = sharded.fill(x, {0: count})
    return filled.reshape(count, filled.shape[0] // count, *x.shape[1:])


def _first_token(table: Table, axes: tuple[str, ...]) -> Array | int:
    """Return the first token of the device's part of the table."""
    return lax.axis_index(axes) * table.shape[0] if axes else 0


def _carried(table: Table, hidden: Rows) -> Table:
    """Return the table as devices gather it: rounded, where each has rows of its own."""
    return table.astype(hidden.dtype) if sharded.axes_of("tokens", hidden.shape[0]) else table

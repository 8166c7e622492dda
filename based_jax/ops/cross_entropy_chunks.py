"""Cross-entropy of a linear layer by tiles of its logits: a block of rows and a chunk of the vocabulary at a time.

Both passes make a tile's logits from hidden states and the table. The gradient of the table is one array, to which each
block of rows adds. Under a mesh a device has its own rows and, where the table lies over `tensor`, its own part of the
vocabulary: devices gather the table's width; they exchange three numbers a row, and the sums of the gradients.
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
TILE_ROWS = 8
"""Of an array of fp32 on a TPU."""
LOWEST = float(jnp.finfo(jnp.float32).min)
ROWS = ("tokens",)
Part = Float[Array, "_ _"]
"""Of a table, with some of its tokens and of its width."""


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
    axes = Axes.of(hidden, table)

    def on_device(hidden, table, labels):
        table = axes.gathered(table)
        own = labels - axes.first_token(table)
        top, total, chosen = _by_blocks(lambda h, label: _statistics(h, table, label), hidden, own)
        highest = lax.pmax(top, axes.vocab)
        total, chosen = lax.psum((total * jnp.exp(top - highest), chosen), axes.vocab)
        logarithm = jnp.log(total)
        return logarithm + (highest - chosen), chosen >= highest, highest, logarithm

    arrays, names = (hidden, axes.carried(table, hidden.dtype), labels), (ROWS, axes.table, ROWS)
    *results, highest, logarithm = sharded.per_shard(on_device, arrays, names, (ROWS,) * 4)
    return tuple(results), (hidden, table, labels, highest, logarithm)


def _by_tiles_bwd(saved, cotangents):
    hidden, table, labels, *statistics = saved
    axes = Axes.of(hidden, table)

    def on_device(hidden, table, labels, *rest):
        table, tokens = axes.gathered(table), table.shape[0]
        rows = hidden, labels - axes.first_token(table), *rest
        dhidden, dtable = _gradients(table, rows, axes.filled(tokens))
        return lax.psum(dhidden, axes.vocab), axes.summed(dtable, tokens)

    arrays = hidden, axes.carried(table, hidden.dtype), labels, *statistics, cotangents[0]
    dhidden, dtable = sharded.per_shard(on_device, arrays, (ROWS, axes.table, *(ROWS,) * 4), (ROWS, axes.table))
    return dhidden.astype(hidden.dtype), dtable.astype(table.dtype), None


_by_tiles.defvjp(_by_tiles_fwd, _by_tiles_bwd)


class Axes(NamedTuple):
    """The mesh axes that divide the rows, the table's tokens, and its width where each part of it is of other rows."""

    rows: tuple[str, ...]
    vocab: tuple[str, ...]
    width: tuple[str, ...]

    @classmethod
    def of(cls, hidden: Rows, table: Table) -> "Axes":
        """Return those of a call on the mesh of `jax.set_mesh`."""
        sizes = ("tokens", hidden.shape[0]), ("vocab", table.shape[0]), ("embed", table.shape[1])
        rows, vocab, width = (sharded.axes_of(*size) for size in sizes)
        return cls(rows, vocab, width if set(width) <= set(rows) else ())

    @property
    def table(self) -> tuple[str, ...]:
        """The names of the table's dimensions that are divided."""
        return ("vocab", "embed") if self.width else ("vocab",)

    def carried(self, table: Part, dtype) -> Part:
        """Return the table as devices gather it: rounded, where each has rows of its own."""
        return table.astype(dtype) if self.rows else table

    def gathered(self, table: Part) -> Part:
        """Return all of the width of a device's part of the table."""
        return lax.all_gather(table, self.width, axis=1, tiled=True) if self.width else table

    def filled(self, tokens: int) -> int:
        """Return how many tokens the gradient has that `summed` takes: of whole tiles for each device."""
        return tokens + (-tokens % (TILE_ROWS * lax.axis_size(self.width)) if self.width else 0)

    def summed(self, dtable: Part, tokens: int) -> Part:
        """Return the part of the gradient's sum over all rows that a device keeps, of so many tokens.

        Devices sum tokens and then exchange widths: to sum a width that is no whole tile a TPU would send all of it.
        """
        if self.width:
            own = lax.psum_scatter(dtable, self.width, scatter_dimension=0, tiled=True)
            dtable = lax.all_to_all(own, self.width, 1, 0, tiled=True)[:tokens]
        return lax.psum(dtable, tuple(axis for axis in self.rows if axis not in self.width))

    def first_token(self, table: Part) -> Array | int:
        """Return the first token of a device's part of the table."""
        return lax.axis_index(self.vocab) * table.shape[0] if self.vocab else 0


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


def _gradients(table: Table, rows: tuple[Array, ...], filled: int) -> tuple[Float[Array, "N D"], Float[Array, "_ D"]]:
    """Return the gradients of hidden rows, from their own part of the vocabulary, and of the table from all rows.

    The latter is `filled` up with zeros to so many tokens.
    """
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

    [zeros] = sharded.vary_alike(jnp.zeros((filled, table.shape[1]), jnp.float32), like=(table, *rows))
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

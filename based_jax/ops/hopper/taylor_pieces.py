"""Pieces of a sequence for the Taylor kernels: how many, what each starts from, and packed documents among them.

A sequence is cut into pieces where batch and heads do not fill the chip. Their sums come first; then a piece starts
from all that lies before it. A piece's start is summed, not the difference of two sums: large late keys would leave
little of it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from based_jax.dims import BT
from based_jax.ops import segments, sharded
from based_jax.ops.hopper.limits import CHUNK_TOKENS, multiprocessors

MIN_CHUNKS_PER_PIECE = 4
"""A shorter piece would cost more to start than it takes."""
RESIDENT_BLOCKS = 2
"""Blocks of the kernel that sums parts of pieces, on a multiprocessor."""

Sums = Float[Array, "_ 64 _"]
"""Sums of pieces, of all heads of all rows in turn, as the kernels take them."""


class Documents(NamedTuple):
    """Packed documents as the kernels read them (`pallas_kernels.hopper.taylor_state.Documents`).

    Attributes:
      table: (B, chunks, Documents.ROW) int32, chunks in the sequence's order.
      ends: (B, chunks), in the order of the scan, the beginning of the document that the state after a chunk holds.
      states: (B, T), whether a token's document owns the state after the last token of the scan.
      unreadable: (B, 1), whether a row has padding inside a document: its o, gradients and state are NaN.
    """

    table: Int[Array, "B N _"]
    ends: Int[Array, "B N"]
    states: Bool[Array, "B T"]
    unreadable: Bool[Array, "B 1"]

    def keeps(self, first: int, last: int) -> Float[Array, "B"]:
        """Return 1 where the state before chunk `first` of the scan is part of that before chunk `last`, else 0."""
        return (self.ends[:, last - 1] < first * CHUNK_TOKENS).astype(jnp.float32)


def documents(segment_ids: BT | None, chunks: int, *, reverse: bool = False) -> Documents | None:
    """Return the documents of a scan over `chunks`, from the last token to the first where `reverse`."""
    # Pallas' GPU modules take half a second to import and are needed only here and below.
    from pallas_kernels.hopper.taylor_state import Documents as Kernel

    if segment_ids is None:
        return None
    batch, time = segment_ids.shape
    unreadable = segments.padding_within(segment_ids)
    ids = jnp.pad(jnp.where(unreadable, 0, segment_ids), ((0, 0), (0, chunks * CHUNK_TOKENS - time)))
    ids = ids[:, ::-1] if reverse else ids
    places = jnp.arange(ids.shape[1])[None]
    present = ids != 0
    start = lax.cummax(jnp.where(jnp.diff(ids, axis=1, prepend=-1) != 0, places, 0), axis=1)
    from_state = present & (ids == segments.first_id(ids)[:, None])
    begin = jnp.where(present, jnp.where(from_state, -1 - start, start), Kernel.NOWHERE)
    latest = lax.cummax(jnp.where(present, places, -1), axis=1)[:, CHUNK_TOKENS - 1 :: CHUNK_TOKENS]
    ends = jnp.take_along_axis(begin, jnp.maximum(latest, 0), axis=1)
    ends = jnp.where(latest < 0, -2 - Kernel.NOWHERE, ends).astype(jnp.int32)
    begin = jnp.where(unreadable, Kernel.UNREADABLE, begin)
    table = begin.astype(jnp.int32).reshape(batch, chunks, CHUNK_TOKENS)
    states = present & (ids == segments.last_id(ids)[:, None])
    if reverse:
        table, states = table[:, ::-1, ::-1], states[:, ::-1]
    last = ends[:, ::-1] if reverse else ends
    table = jnp.concatenate([table, jnp.repeat(last[..., None], Kernel.ROW - CHUNK_TOKENS, axis=2)], axis=2)
    return Documents(table, ends, states[:, :time], unreadable)


def number_of_pieces(sequences: int, chunks: int) -> int:
    """Return into how many pieces each of `sequences` (batch times heads) is cut so that all multiprocessors work."""
    return max(1, min(multiprocessors() // sequences, chunks // MIN_CHUNKS_PER_PIECE))


def number_of_parts(pieces: int) -> int:
    """Return into how many parts each of `pieces` (of all sequences) is cut to be summed, one for each block.

    Of those that are under way together, the number that leaves the fewest multiprocessors with less to do.
    """

    def busy(parts: int) -> float:
        blocks = pieces * parts
        return blocks / (-(-blocks // multiprocessors()) * multiprocessors())

    return max(
        range(1, max(1, RESIDENT_BLOCKS * multiprocessors() // pieces) + 1), key=lambda parts: (busy(parts), parts)
    )


def running(
    first: Sums | None,
    sums: Callable,
    *,
    batch: int,
    heads: int,
    chunks: int,
    pieces: int,
    docs: Documents | None = None,
    reverse: bool = False,
) -> tuple[Sums | None, Callable[[], Sums]]:
    """Return what lies before each piece, None for nothing, and a function that returns what lies before the end.

    Args:
      first: what lies before the first piece of each sequence, None for nothing.
      sums: function of (pieces, taken) that returns what each taken piece adds, in a list of one.
      batch, heads: their product is the number of sequences.
      chunks: length of a sequence.
      docs: the documents of the scan.
      reverse: the scan goes from the last piece to the first.
    """
    scan = _Scan(sums, batch, heads, chunks, docs, reverse)
    before = scan.starts(first, pieces) if pieces > 1 else first
    # XLA drops the total where the caller does not use the state.
    return before, functools.partial(scan.total, before, pieces)


class _Scan(NamedTuple):
    """A scan of `running`."""

    sums: Callable
    batch: int
    heads: int
    chunks: int
    docs: Documents | None
    reverse: bool

    def starts(self, first: Sums | None, pieces: int) -> Sums:
        """Return what lies before each of several pieces."""
        from pallas_kernels.hopper.taylor_starts import starts

        parts = min(number_of_parts(self.batch * self.heads * (pieces - 1)), self.chunks // pieces)
        taken = range(parts, parts * pieces) if self.reverse else range(parts * (pieces - 1))
        [added] = self.sums(pieces=parts * pieces, taken=taken)
        options = {"heads": self.heads, "pieces": pieces, "parts": parts, "reverse": self.reverse}
        [before] = sharded.launch(starts, added, first, keeps=self.keeps(parts * pieces, taken), **options)
        return before

    def total(self, before: Sums | None, pieces: int) -> Sums:
        """Return what lies before the end, from what lies before each piece."""
        parts = min(number_of_parts(self.batch * self.heads), self.chunks // pieces)
        taken = range(parts) if self.reverse else range((pieces - 1) * parts, pieces * parts)
        [added] = self.sums(pieces=pieces * parts, taken=taken)
        kept = self.keeps(pieces * parts, taken)
        added = added.reshape(self.batch, self.heads, parts, *added.shape[1:])
        last = None
        if before is not None:
            last = before.reshape(self.batch, self.heads, pieces, *before.shape[1:])[:, :, 0 if self.reverse else -1]
        return _after(last, added[:, :, ::-1] if self.reverse else added, kept).reshape(-1, *added.shape[3:])

    def keeps(self, pieces: int, taken: range) -> Float[Array, "B N"] | None:
        """Return what each taken piece keeps, in the order of the scan."""
        if self.docs is None:
            return None
        chunks = self.chunks
        bounds = [(piece * chunks // pieces, (piece + 1) * chunks // pieces) for piece in taken]
        bounds = [(chunks - end, chunks - begin) for begin, end in bounds[::-1]] if self.reverse else bounds
        return jnp.stack([self.docs.keeps(*bound) for bound in bounds], axis=1)


def _after(before: Array | None, added: Array, keeps: Float[Array, "B N"] | None) -> Array:
    """Return `before` (B, H, ., .) with all of `added` (B, H, N, ., .), each of which keeps what is before or not."""
    if keeps is None:
        total = added.sum(axis=2)
        return total if before is None else total + before
    later = jnp.cumprod(keeps[:, ::-1], axis=1)[:, ::-1]
    kept = jnp.concatenate([later[:, 1:], jnp.ones_like(later[:, :1])], axis=1)
    total = (added * kept[:, None, :, None, None]).sum(axis=2)
    return total if before is None else total + before * later[:, :1, None, None]

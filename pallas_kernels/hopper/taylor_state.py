"""The running sums of the Taylor kernels on Hopper: one warpgroup keeps them in registers and adds chunk after chunk.

The sums of x (C, 16) and y (C, V) over tokens are S^T (V, 160) = sum y phi(x)^T, of packed features
(`taylor_packing.py`), and the moments (64, 16) = sum [x, 1] x^T: rows 0 to 15 of products, row 16 the sum of x. In
arrays they stand side by side, (64, SUMS_COLUMNS) fp32.

V is 64. Wider values are several parts, each for a block of its own, which reads its columns and the queries and keys
of all; of the last part what is beyond the array is read as zeros and not written.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, TILE_ROWS
from pallas_kernels.hopper.taylor_packing import FEATURE_DIM, PACKED_DIM, expand

VALUE_DIM = 64
"""Values of a part of a head."""
MOMENTS_SHAPE = (TILE_ROWS, FEATURE_DIM)
SUMS_COLUMNS = PACKED_DIM + FEATURE_DIM
"""Columns of an array of sums."""
SUMS_PARTS = pl.ds(0, PACKED_DIM), pl.ds(PACKED_DIM, FEATURE_DIM)
"""Those of S^T and of the moments."""
COUNT_ENTRY = FEATURE_DIM + 1, PACKED_DIM
"""The entry of given sums that holds the number of tokens; the kernels leave it as it is."""


class State:
    """The sums' warpgroup: its shared memory and what it does.

    Chunk n lies in slot n % slots; chunks are fetched as far ahead as their slots are free.
    """

    def __init__(self, x_tile, y_tile, filled, phi_tile, moments_tile, *, fetch, count, factors=None, keeps=None):
        """Take slots of x and y with their barriers, `scratch`, and the number of chunks.

        `fetch(n)` starts the copies of chunk n. `factors(slot)` returns (C,) factors of phi(x) and of the moments,
        `keeps(n, slot)` 1 or 0 for the sums of the chunks before.
        """
        self.x_tile, self.y_tile, self.filled = x_tile, y_tile, filled
        self.phi_tile, self.moments_tile = phi_tile, moments_tile
        self.fetch, self.count, self.factors, self.keeps = fetch, count, factors, keeps
        self.slots = x_tile.shape[0]

    @staticmethod
    def scratch(swizzle: int) -> list:
        """Return the shared memory of `phi_tile`, with the swizzle of y, and of `moments_tile`."""
        return [
            mosaic.swizzled((2, CHUNK_TOKENS, PACKED_DIM), swizzle),
            mosaic.swizzled((2, CHUNK_TOKENS, CHUNK_TOKENS), mosaic.NARROW_SWIZZLE),
        ]

    def accumulate(self, block, initial=None, *, publish, free=None):
        """Return the sums over all chunks; `publish(n, state, moments)` shows those before chunk n and commits.

        `initial` is an array of sums for each block, or None. `free` are two barriers, one per turn, at which what was
        published two chunks before has been read, and that chunk's slot; None where nobody else reads.
        """
        ahead = self.slots - (1 if free is None else 2)
        for n in range(ahead):
            pl.when(n < self.count)(functools.partial(self.fetch, n))
        ones = jnp.where(mosaic.iota(mosaic.PAIRS_SHAPE, 1) == FEATURE_DIM, 1.0, 0.0)
        for turn in range(2):
            self.moments_tile.at[turn][...] = ones.astype(self.moments_tile.dtype)
        self._write(0)
        if initial is None:
            sums = mosaic.zeros((self.y_tile.shape[2], PACKED_DIM)), mosaic.zeros(MOMENTS_SHAPE)
        else:
            state, moments = (mosaic.load_global(initial.at[block, :, part], mosaic.WGMMA) for part in SUMS_PARTS)
            sums = state, moments

        def step(n, carry):
            if free is not None:
                pl.when(n >= 2)(lambda: plgpu.barrier_wait(free.at[lax.rem(n, 2)]))
            publish(n, *carry)
            return self._add(n, carry, ahead)

        sums = lax.fori_loop(0, self.count, step, sums)
        if free is not None:
            for back in (2, 1):
                last = free.at[lax.rem(self.count - back, 2)]
                pl.when(self.count >= back)(functools.partial(plgpu.barrier_wait, last))
        return sums

    def _add(self, n, carry, ahead: int):
        """Return the sums with chunk n; under its products fetch and expand what follows."""
        slot, turn = lax.rem(n, self.slots), lax.rem(n, 2)
        if self.keeps is not None:
            carry = tuple(x * self.keeps(n, slot) for x in carry)

        def issue(accumulators):
            state, moments = accumulators
            mosaic.multiply(state, self.y_tile.at[slot].T, self.phi_tile.at[turn])
            mosaic.multiply(moments, self.moments_tile.at[turn].T, self.x_tile.at[slot])
            pl.when(n + ahead < self.count)(lambda: self.fetch(n + ahead))
            pl.when(n + 1 < self.count)(lambda: self._write(n + 1))

        return mosaic.accumulate(issue, carry)

    def _write(self, n) -> None:
        """Expand chunk n into its turn of phi and moments tiles."""
        slot, turn = lax.rem(n, self.slots), lax.rem(n, 2)
        plgpu.barrier_wait(self.filled.at[slot])
        x = mosaic.load(self.x_tile.at[slot])
        phi, columns = expand(x, query=False), [x]
        if self.factors is not None:
            scale, weight = self.factors(slot)
            phi, weights = phi * mosaic.across(scale.astype(phi.dtype), phi.shape), mosaic.across(weight, x.shape)
            ones = jnp.where(mosaic.iota(x.shape, 1) == 0, weights, 0.0)
            columns = [(x.astype(jnp.float32) * weights).astype(x.dtype), ones.astype(x.dtype)]
        for i, values in enumerate(columns):
            self.moments_tile.at[turn, :, pl.ds(i * FEATURE_DIM, FEATURE_DIM)][...] = values
        self.phi_tile.at[turn][...] = phi


def groups(refs, *sizes: int) -> list[tuple]:
    """Cut a kernel's references into groups of these sizes, and the rest."""
    found, begin = [], 0
    for size in sizes:
        found.append(refs[begin : begin + size])
        begin += size
    return [*found, refs[begin:]]


class Parts(NamedTuple):
    """How heads are cut into parts.

    Attributes:
      of_head: how many a head has.
      heads: how many all heads together have.
      swizzle: of tiles of them that are operands of products.
      output_swizzle: of others.
    """

    of_head: int
    heads: int
    swizzle: int
    output_swizzle: int

    @classmethod
    def of(cls, values) -> "Parts":
        """Return those of (B, T, H, V), V a multiple of 16: whole parts can be copied in wider tiles."""
        heads, width = values.shape[2:]
        whole = width % VALUE_DIM == 0
        parts = pl.cdiv(width, VALUE_DIM)
        swizzles = (mosaic.MEDIUM_SWIZZLE, mosaic.WIDE_SWIZZLE) if whole else (mosaic.NARROW_SWIZZLE,) * 2
        return cls(parts, heads * parts, *swizzles)

    def of_tokens(self, ref, row, tokens, part):
        """Return the tokens of a part in a (B, T, H, .) array, its columns, or all of queries and keys."""
        if self.of_head == 1:
            return ref.at[row, tokens, part]
        head, columns = lax.div(part, self.of_head), pl.ds(lax.rem(part, self.of_head) * VALUE_DIM, VALUE_DIM)
        return ref.at[row, tokens, head] if ref.shape[3] == FEATURE_DIM else ref.at[row, tokens, head, columns]


def place(block, heads: int, chunks: int, pieces: int, taken: range | None = None):
    """Return a block's batch row, head, first chunk and number of chunks; `taken` are the pieces that have a block."""
    taken = taken or range(pieces)
    piece = taken.start + lax.rem(block, len(taken))
    begin = lax.div(piece * chunks, pieces)
    count = lax.div((piece + 1) * chunks, pieces) - begin
    return lax.div(block, len(taken) * heads), lax.rem(lax.div(block, len(taken)), heads), begin, count


def copy_chunk(parts: Parts, sources, tiles, filled, slot, row, part, chunk) -> None:
    """Start the copies of a chunk of (B, T, H, .), (B, parts, T) and document (B, chunks, .) arrays into a slot."""
    tokens = pl.ds(chunk * CHUNK_TOKENS, CHUNK_TOKENS)
    for source, tile in zip(sources, tiles, strict=True):
        if source.dtype == jnp.int32:
            of_part = source.at[row, chunk]
        elif len(source.shape) == 4:
            of_part = parts.of_tokens(source, row, tokens, part)
        else:
            of_part = source.at[row, part, tokens]
        plgpu.copy_gmem_to_smem(of_part, tile.at[slot], filled.at[slot])


class Documents:
    """What a block knows of packed documents: where the document of each token of a slot begins.

    A chunk's row holds C beginnings, in tokens from the sequence's first, and at LAST the one of the document that the
    state after the chunk belongs to. The document that the initial state belongs to has -1 - beginning, so that what is
    below a chunk's first token reads the state before the chunk; `NOWHERE` is the beginning of padding, and
    `UNREADABLE` of tokens whose outputs must be NaN.
    """

    ROW = CHUNK_TOKENS + 32
    LAST = CHUNK_TOKENS
    NOWHERE = 1 << 30
    UNREADABLE = NOWHERE + 1

    def __init__(self, tile):
        """Take the slots (slots, ROW) int32."""
        self.tile = tile

    @classmethod
    def of(cls, tiles) -> "Documents | None":
        """Return the documents of a kernel that has been given their slots, or no tiles."""
        return cls(*tiles) if tiles else None

    @classmethod
    def scratch(cls, slots: int) -> plgpu.SMEM:
        """Return the shared memory of `tile`."""
        return plgpu.SMEM((slots, cls.ROW), jnp.int32)

    def begin(self, slot) -> jax.Array:
        """Return the encoded beginning of each token's document."""
        return plgpu.load(self.tile.at[slot, pl.ds(0, CHUNK_TOKENS)], layout=mosaic.ROW_LAYOUT)

    def owned(self, slot) -> tuple[jax.Array, jax.Array]:
        """Return, twice, 1 for each token that the state after the chunk holds, else 0: `State`'s factors."""
        mask = jnp.where(self.begin(slot) == self.tile[slot, self.LAST], 1.0, 0.0)
        return mask, mask

    def keeps(self, first) -> Callable:
        """Return `State`'s `keeps`, given the function from a chunk to its first token."""

        def keep(n, slot):
            return jnp.where(self.tile[slot, self.LAST] < first(n), 1.0, 0.0)

        return keep


def owned_by(documents: Documents | None, first: Callable) -> dict:
    """Return the options of a `State` that forgets ended documents; `first(n)` is the first token of chunk n."""
    return {} if documents is None else {"factors": documents.owned, "keeps": documents.keeps(first)}


def decoded(begin: jax.Array) -> jax.Array:
    """Return the beginning of documents whatever state they start from."""
    return jnp.where(begin < 0, -1 - begin, begin)


def unit() -> jax.Array:
    """Return a (C, 16) tile whose first column is one and the others zero: what reads row 16 of the moments."""
    return jnp.where(mosaic.iota((CHUNK_TOKENS, FEATURE_DIM), 1) == 0, 1.0, 0.0)


def row_factors(z_tile, weight_tile, documents: Documents | None):
    """Return what `State` takes as `factors`: 1/z and the weight of each row of a slot, both zero where not owned."""

    def factors(slot):
        z, weight = (plgpu.load(tile.at[slot], layout=mosaic.ROW_LAYOUT) for tile in (z_tile, weight_tile))
        pair = 1.0 / z, weight
        return pair if documents is None else tuple(x * documents.owned(slot)[0] for x in pair)

    return factors


def moment_weights(products: float, linear: float) -> jax.Array:
    """Return factors (64, 16) of the moments: `products` in rows 0 to 15, `linear` in row 16, zeros below."""
    rows = mosaic.iota(MOMENTS_SHAPE, 0)
    return jnp.where(rows < FEATURE_DIM, products, jnp.where(rows == FEATURE_DIM, linear, 0.0))

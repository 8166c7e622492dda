"""Causal convolutions of channels, as products with the tiles of their filters' Toeplitz matrices, in Triton kernels.

With blocks i and j of `BLOCK_TOKENS` tokens, d = i - j, and places o and p in them:

    y_io = sum_j sum_p tile_d,po x_jp      tile_d,po = h_{64 d + o - p}      dh_l = sum_{64 d + o - p = l} x_jp dy_io

A tile is the same for all pairs of blocks as far apart, of all rows: these are the rows of a product. What x gets is
the same in the other direction of time. Of packed documents the last one of a block goes on in others, where it is the
first one; in a block itself they are multiplied one after another.

Arrays are (D, B, T) in bf16, T a multiple of `BLOCK_TOKENS`, filters (D, L) fp32. D rows of a launch share (B, .) ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton.launch import Type, launch

BLOCK_TOKENS = 64
COLUMN_COUNT, WARPS, STAGES = 128, 8, 3
"""Blocks of tokens that are multiplied with a tile at once, and how."""
GRADIENT_COLUMN_COUNT, GRADIENT_WARPS, GRADIENT_STAGES = 64, 4, 3
"""Likewise of a product that makes a tile's gradient."""
SHIFT_COUNT = 4
"""Copies of a filter, one element from each other: each row of every tile begins at a multiple of so many elements.

A thread copies that many at once. Eight bytes go through the L1 cache, in which the next tiles' rows and blocks are for
the most part; sixteen would go past it.
"""
BLOCK, SHIFTS = tl.constexpr(BLOCK_TOKENS), tl.constexpr(SHIFT_COUNT)
"""The same, as kernels read them."""


class Cut(NamedTuple):
    """D, B and T / `BLOCK_TOKENS` of a call, how many blocks before its own a token sees, and blocks of a program.

    `step` is 1 where tokens see those before them, and -1 where they see those behind.
    """

    channels: int
    rows: int
    blocks: int
    reach: int
    columns: int
    step: int

    @classmethod
    def of(cls, x, taps: int, columns: int, step: int = 1) -> "Cut":
        """Return that of (D, B, T) inputs and a filter of so many taps."""
        channels, rows, time = x.shape
        return cls(channels, rows, time // BLOCK_TOKENS, blocks_before(time, taps), columns, step)

    @property
    def programs(self) -> int:
        """Of a channel's products."""
        return -(-self.rows * self.blocks // self.columns)

    @property
    def pairs(self) -> int:
        """Of a filter's tiles, but for the first."""
        return -(-self.reach // 2)

    @property
    def width(self) -> int:
        """Elements of each copy of a filter."""
        return (self.reach + 2) * BLOCK_TOKENS

    @property
    def origin(self) -> int:
        """Where in the first copy the first element of tile 0 is."""
        return BLOCK_TOKENS if self.step == 1 else BLOCK_TOKENS * (self.reach + 1)


def blocks_before(time: int, taps: int) -> int:
    """Return how many blocks before its own a token reaches at most."""
    return min(time // BLOCK_TOKENS - 1, (taps + BLOCK_TOKENS - 2) // BLOCK_TOKENS)


class Sight(NamedTuple):
    """What documents let tokens see, of those before them.

    Attributes:
      place: (B, T) int32, which of the documents of its block a token's is, from 0.
      reach: (B, T / `BLOCK_TOKENS`) int32, in how many blocks before there are tokens of the first one.
    """

    place: jax.Array
    reach: jax.Array

    @classmethod
    def of(cls, numbers: jax.Array, taps: int) -> "Sight":
        """Return that of documents' numbers (B, T) and a filter of so many taps."""
        rows, time = numbers.shape
        token = jnp.arange(time)[None]
        begins = numbers != jnp.pad(numbers[:, :-1], ((0, 0), (1, 0)))
        start = jax.lax.cummax(jnp.where(begins, token, 0), axis=1)
        before = (token // BLOCK_TOKENS - start // BLOCK_TOKENS)[:, ::BLOCK_TOKENS]
        count = jnp.cumsum(begins, axis=1, dtype=jnp.int32).reshape(rows, -1, BLOCK_TOKENS)
        return cls((count - count[:, :, :1]).reshape(rows, time), jnp.minimum(before, blocks_before(time, taps)))

    @classmethod
    def of_one(cls, rows: int, time: int, taps: int) -> "Sight":
        """Return that of rows which are one document each: XLA would make `of`'s scans of constants as it compiles."""
        reach = jnp.minimum(jnp.arange(time // BLOCK_TOKENS, dtype=jnp.int32), blocks_before(time, taps))
        return cls(jnp.zeros((rows, time), jnp.int32), jnp.broadcast_to(reach, (rows, len(reach))))

    @classmethod
    def behind(cls, numbers: jax.Array, taps: int) -> "Sight":
        """Return what they see of those behind them."""
        return cls.of(jnp.flip(numbers, 1), taps).flipped()

    def flipped(self) -> "Sight":
        """Return the same of time that is reversed."""
        return Sight(*(jnp.flip(x, 1) for x in self))

    def leaving(self, step: int = 1) -> jax.Array:
        """Return which tokens (B, T) others see than those of their own block."""
        blocks = self.place.reshape(len(self.place), -1, BLOCK_TOKENS)
        last = blocks[:, :, -1:] if step == 1 else blocks[:, :, :1]
        return (blocks == last).reshape(self.place.shape)


def products(x, leaving, taps, sight: Sight, *, step: int = 1) -> jax.Array:
    """Return y (D, B, T).

    Args:
      leaving: x where it leaves its block, 0 elsewhere.
      sight: with `step` -1 tokens see those behind them, and this is `Sight.behind`.
    """
    cut = Cut.of(x, taps.shape[1], COLUMN_COUNT, step)
    arguments = [x, leaving, _copies(taps, cut, x.dtype), *sight]
    options: dict[str, Any] = {"warps": WARPS, "stages": STAGES, "cut": cut}
    [y] = launch(toeplitz_products, cut.programs, arguments, [Type(x.shape, x.dtype)], **options)
    return y


def gradients(x, leaving, dy, entering, taps: int, sight: Sight, behind: Sight) -> jax.Array:
    """Return dh (D, `taps`) fp32; `entering` is dy where it would leave its block if time were reversed."""
    cut = Cut.of(x, taps, GRADIENT_COLUMN_COUNT)
    sums = _tile_gradients(toeplitz_block_gradients, 1, 1, [x, dy, sight.place], cut)
    if cut.reach:
        arguments = [leaving, entering, behind.reach]
        sums = jnp.concatenate([sums, _tile_gradients(toeplitz_gradients, cut.pairs, 2, arguments, cut)], axis=1)
    before, own = jnp.split(sums, 2, axis=2)
    later = jnp.pad(before, ((0, 0), (0, 1), (0, 0)))[:, 1:]
    return (own + later).reshape(cut.channels, -1)[:, :taps]


def _tile_gradients(kernel, programs: int, tiles: int, arguments, cut: Cut) -> jax.Array:
    """Return the gradients of so many tiles of each program of a channel, summed over their diagonals."""
    types = [Type((cut.channels, programs * tiles, 2 * BLOCK_TOKENS), jnp.float32)]
    options: dict[str, Any] = {"warps": GRADIENT_WARPS, "stages": GRADIENT_STAGES, "cut": cut}
    [sums] = launch(kernel, programs, arguments, types, **options)
    return sums


def _copies(taps, cut: Cut, dtype) -> jax.Array:
    """Return the copies of filters (D, `SHIFT_COUNT`, width): copy n is n elements behind the first."""
    taps = jnp.pad(taps.astype(dtype), ((0, 0), (BLOCK_TOKENS + SHIFT_COUNT, cut.width)))
    starts = range(SHIFT_COUNT, 0, -1) if cut.step == 1 else range(SHIFT_COUNT + 1, 2 * SHIFT_COUNT + 1)
    return jnp.stack([taps[:, start : start + cut.width][:, :: cut.step] for start in starts], axis=1)


@triton.jit
def toeplitz_products(x, leaving, taps, place, reach, y, cut: tl.constexpr):
    """Multiply blocks before those of a program with their tiles one after another, then those themselves."""
    channel, group = tl.program_id(0) // cut.programs, tl.program_id(0) % cut.programs
    real, token, block = blocks_of(group * cut.columns, SHIFTS, cut)
    start, lane = channel_of(channel, cut)
    tile = first_tile(taps, channel, cut)
    seen = tl.load(reach + lane + block, mask=real, other=0)
    sums = tl.full((cut.columns, BLOCK), 0.0, tl.float32)
    for d in range(1, tl.max(seen, axis=0) + 1):
        given = tl.load(leaving + start + token - d * (cut.step * BLOCK), mask=(d <= seen)[:, None], other=0)
        sums = tl.dot(given, tl.load(tile + d * (cut.step * BLOCK)), sums)
    place = tl.load(place + lane * BLOCK + token, mask=real[:, None], other=0)
    sums = tl.where(place == 0, sums, 0)
    own, h = tl.load(x + start + token, mask=real[:, None], other=0), tl.load(tile)
    for document in range(0, tl.max(place) + 1):
        product = tl.dot(tl.where(place == document, own, 0), h)
        sums += tl.where(place == document, product, 0)
    tl.store(y + start + token, sums.to(y.dtype.element_ty), mask=real[:, None])


@triton.jit
def toeplitz_block_gradients(x, dy, place, sums, cut: tl.constexpr):
    """Add up the products of a channel's blocks with themselves, then these along the diagonals."""
    channel = tl.program_id(0)
    start, lane = channel_of(channel, cut)
    total = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for first in tl.range(0, cut.rows * cut.blocks, cut.columns, num_stages=1):
        real, token, _ = blocks_of(first, BLOCK, cut)
        given = tl.load(x + start + token, mask=real[:, None], other=0)
        taken = tl.load(dy + start + token, mask=real[:, None], other=0)
        places = tl.load(place + lane * BLOCK + token, mask=real[:, None], other=0)
        for document in range(0, tl.max(places) + 1):
            own = tl.where(places == document, given, 0)
            total = tl.dot(tl.trans(own), tl.where(places == document, taken, 0), total)
    store_diagonal_sums(sums, channel, total)


@triton.jit
def toeplitz_gradients(leaving, entering, ahead, sums, cut: tl.constexpr):
    """Add up the products of all pairs of blocks d and d + 1 apart, then these along the diagonals."""
    channel, pair = tl.program_id(0) // cut.pairs, tl.program_id(0) % cut.pairs
    start, lane = channel_of(channel, cut)
    d = 1 + 2 * pair
    near, far = tl.full((BLOCK, BLOCK), 0.0, tl.float32), tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for first in range(0, cut.rows * (cut.blocks - d), cut.columns):
        real, token, block = blocks_of(first, BLOCK, cut)
        seen = tl.load(ahead + lane + block, mask=real, other=0)
        given = tl.trans(tl.load(leaving + start + token, mask=(d <= seen)[:, None], other=0))
        later = entering + start + token + d * BLOCK
        near = tl.dot(given, tl.load(later, mask=(d <= seen)[:, None], other=0), near)
        far = tl.dot(given, tl.load(later + BLOCK, mask=(d < seen)[:, None], other=0), far)
    store_diagonal_sums(sums, 2 * tl.program_id(0), near)
    store_diagonal_sums(sums, 2 * tl.program_id(0) + 1, far)


@triton.jit
def blocks_of(first, copied: tl.constexpr, cut: tl.constexpr):
    """Return which blocks there are from `first` on, where their tokens are in (B, T), and they in (B, blocks).

    All rows' blocks with one place in time come together. A thread may copy so many tokens at once.
    """
    column = first + tl.arange(0, cut.columns)
    block = column % cut.rows * cut.blocks + column // cut.rows
    token = block[:, None] * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), copied)[None, :]
    return column < cut.rows * cut.blocks, token, block


@triton.jit
def channel_of(channel, cut: tl.constexpr):
    """Return where a channel begins in (D, B, T), and where its lane does in (B, blocks)."""
    return channel.to(tl.int64) * (cut.rows * cut.blocks * BLOCK), channel // cut.channels * (cut.rows * cut.blocks)


@triton.jit
def first_tile(taps, channel, cut: tl.constexpr):
    """Return where the elements of tile 0 are of a channel's filter."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.max_contiguous(tl.arange(0, BLOCK), SHIFTS)[None, :]
    copy = taps + channel.to(tl.int64) * (SHIFTS * cut.width) + row % SHIFTS * cut.width
    return copy + cut.origin - row // SHIFTS * SHIFTS + column


@triton.jit
def store_diagonal_sums(sums, n, tile):
    """Write the sums of a tile's diagonals, from 64 columns before its own one on, as those of tile n."""
    lag = tl.arange(0, 2 * BLOCK)
    column = tl.arange(0, BLOCK)[:, None] + lag[None, :] - BLOCK
    inside = (column >= 0) & (column < BLOCK)
    along = tl.where(inside, tl.gather(tile, tl.where(inside, column, 0), 1), 0)
    tl.store(sums + n.to(tl.int64) * (2 * BLOCK) + lag, tl.sum(along, axis=0))

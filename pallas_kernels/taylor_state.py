"""The running sums of the Taylor kernels on Hopper: one warpgroup keeps them in registers and adds chunk after chunk.

The sums of x (C, 16) and y (C, V) over tokens are S^T (V, 160) = sum y phi(x)^T, of packed features
(`taylor_packing.py`), and the moments (64, 16) = sum [x, 1] x^T: rows 0 to 15 of products, row 16 the sum of x.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.mosaic import TILE
from pallas_kernels.taylor_packing import FEATURE_DIM, PACKED_DIM, expand

C = TILE
MOMENTS = (C, FEATURE_DIM)
COUNT_ROW = FEATURE_DIM + 1
"""The row of given moments whose first entry is the number of tokens; the kernels leave it as it is."""


class State:
    """The sums' warpgroup: its shared memory and what it does.

    Chunk n lies in slot n % slots. The slots of the last two chunks may still be read by others, hence `ahead`.
    """

    def __init__(self, x_tile, y_tile, filled, phi_tile, moments_tile, *, fetch, count, factors=None):
        """Take slots of x and y with their barriers, `scratch`, and the number of chunks.

        `fetch(n)` starts the copies of chunk n; `factors(slot)` returns (C,) factors of phi(x) and of the moments.
        """
        self.x_tile, self.y_tile, self.filled = x_tile, y_tile, filled
        self.phi_tile, self.moments_tile = phi_tile, moments_tile
        self.fetch, self.count, self.factors = fetch, count, factors
        self.slots = x_tile.shape[0]
        self.ahead = self.slots - 2

    @staticmethod
    def scratch() -> list:
        """Return the shared memory of `phi_tile` and `moments_tile`."""
        return [mosaic.swizzled((2, C, PACKED_DIM), mosaic.MEDIUM), mosaic.swizzled((2, C, C), mosaic.NARROW)]

    def run(self, block, initial_refs, publish, free=None):
        """Return the sums over all chunks; `publish(n, state, moments)` shows those before chunk n and commits.

        `free` are two barriers, one per turn, at which what was published two chunks before has been read.
        """
        for n in range(self.ahead):
            pl.when(n < self.count)(functools.partial(self.fetch, n))
        ones = jnp.where(mosaic.iota((C, C), 1) == FEATURE_DIM, 1.0, 0.0)
        for turn in range(2):
            self.moments_tile.at[turn][...] = ones.astype(self.moments_tile.dtype)
        self._write(0)
        if initial_refs:
            carry = tuple(plgpu.load(ref.at[block], layout=mosaic.WGMMA, optimized=False) for ref in initial_refs)
        else:
            carry = mosaic.zeros((self.y_tile.shape[2], PACKED_DIM)), mosaic.zeros(MOMENTS)

        def step(n, carry):
            if free is not None:
                pl.when(n >= 2)(lambda: plgpu.barrier_wait(free.at[lax.rem(n, 2)]))
            publish(n, *carry)
            return self._add(n, carry)

        carry = lax.fori_loop(0, self.count, step, carry)
        if free is not None:
            for back in (2, 1):
                last = free.at[lax.rem(self.count - back, 2)]
                pl.when(self.count >= back)(functools.partial(plgpu.barrier_wait, last))
        return carry

    def _add(self, n, carry):
        """Return the sums with chunk n; under its products fetch and expand what follows."""

        def issue(accumulators):
            state, moments = accumulators
            slot, turn = lax.rem(n, self.slots), lax.rem(n, 2)
            mosaic.multiply(state, self.y_tile.at[slot].T, self.phi_tile.at[turn])
            mosaic.multiply(moments, self.moments_tile.at[turn].T, self.x_tile.at[slot])
            pl.when(n + self.ahead < self.count)(lambda: self.fetch(n + self.ahead))
            pl.when(n + 1 < self.count)(lambda: self._write(n + 1))

        return mosaic.accumulate(issue, carry)

    def _write(self, n) -> None:
        slot, turn = lax.rem(n, self.slots), lax.rem(n, 2)
        plgpu.barrier_wait(self.filled.at[slot])
        x = mosaic.load(self.x_tile.at[slot])
        phi = expand(x, query=False)
        moments = self.moments_tile.at[turn]
        if self.factors is None:
            moments.at[:, pl.ds(0, FEATURE_DIM)][...] = x
        else:
            scale, weight = self.factors(slot)
            phi = phi * mosaic.across(scale.astype(phi.dtype), phi.shape)
            weights = mosaic.across(weight, x.shape)
            moments.at[:, pl.ds(0, FEATURE_DIM)][...] = (x.astype(jnp.float32) * weights).astype(x.dtype)
            ones = jnp.where(mosaic.iota(x.shape, 1) == 0, weights, 0.0)
            moments.at[:, pl.ds(FEATURE_DIM, FEATURE_DIM)][...] = ones.astype(x.dtype)
        self.phi_tile.at[turn][...] = phi


def place(block, heads: int, chunks: int, pieces: int, taken: range | None = None):
    """Return a block's batch row, head, first chunk and number of chunks; `taken` are the pieces that have a block."""
    taken = taken or range(pieces)
    piece = taken.start + lax.rem(block, len(taken))
    begin = lax.div(piece * chunks, pieces)
    count = lax.div((piece + 1) * chunks, pieces) - begin
    return lax.div(block, len(taken) * heads), lax.rem(lax.div(block, len(taken)), heads), begin, count


def copy_chunk(sources, tiles, filled, slot, row, head, chunk) -> None:
    """Start the copies of a chunk of (B, T, H, .) and (B, H, T) arrays into a slot."""
    tokens = pl.ds(chunk * C, C)
    for source, tile in zip(sources, tiles, strict=True):
        part = source.at[row, tokens, head] if len(source.shape) == 4 else source.at[row, head, tokens]
        plgpu.copy_gmem_to_smem(part, tile.at[slot], filled.at[slot])


def unit() -> jax.Array:
    """Return a (C, 16) tile whose first column is one and the others zero: what reads row 16 of the moments."""
    return jnp.where(mosaic.iota((C, FEATURE_DIM), 1) == 0, 1.0, 0.0)


def row_factors(z_tile, weight_tile):
    """Return what `State` takes as `factors`: 1/z and the weight of each row of a slot."""

    def factors(slot):
        z, weight = (plgpu.load(tile.at[slot], layout=mosaic.ROWS) for tile in (z_tile, weight_tile))
        return 1.0 / z, weight

    return factors


def moment_weights(products: float, linear: float) -> jax.Array:
    """Return factors (64, 16) of the moments: `products` in rows 0 to 15, `linear` in row 16, zeros below."""
    rows = mosaic.iota(MOMENTS, 0)
    return jnp.where(rows < FEATURE_DIM, products, jnp.where(rows == FEATURE_DIM, linear, 0.0))

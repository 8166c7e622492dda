"""What the memory-bound Mosaic GPU kernels share: one warpgroup walks over tiles in a ring, and writes back in place.

A tile's results overwrite its inputs in shared memory, element by element, once the lanes that need one have read it
(`mosaic.await_warp` where these are several); then they are copied out, and once they are gone the slot is filled.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP_LANES = 128
"""Of a warpgroup; the channels of the arrays that the kernels copy come in rows of as many."""


def row_layout(rows: int):
    """Return the layout of an array (rows, WARPGROUP_LANES) in the order of the lanes, `rows` elements to a lane."""
    return plgpu.Layout.WG_STRIDED((rows, WARPGROUP_LANES), vec_size=rows)


def load(ref) -> jax.Array:
    """Return a row (rows, WARPGROUP_LANES) of shared or global memory in fp32."""
    return plgpu.load(ref, layout=row_layout(ref.shape[0]), optimized=False).astype(jnp.float32)


def rows_per_lane(channels: int, most: int) -> int:
    """Return how many elements of a row each lane takes: a power of two that divides the channels."""
    return math.gcd(channels // WARPGROUP_LANES, most)


def sigmoid(x) -> jax.Array:
    """Return 1 / (1 + exp(-x)) with two approximate instructions; a division takes many."""
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return root * root


class Ring:
    """Tiles on their way through shared memory; what a block reads otherwise, it reads once the first are under way."""

    def __init__(self, count, slots: int, filled, fetch: Callable):
        """Start the copies of the first tiles; `fetch(n, slot)` starts those of tile n, to arrive at `filled[slot]`."""
        self.count, self.slots, self.filled, self.fetch = count, slots, filled, fetch
        for n in range(slots - 1):
            self._start(n)

    def walk(self, step: Callable, put: Callable, carry, ahead: int = 0):
        """Return the carry after `step(n, slot, carry)` for n < count, each followed by the copies of `put(n, slot)`.

        A step may read `ahead` tiles (0 or 1) beyond its own, where they exist.
        """
        if ahead:
            plgpu.barrier_wait(self.filled.at[0])

        def body(n, carry):
            slot, awaited = lax.rem(n, self.slots), n + ahead
            arrival = self.filled.at[lax.rem(awaited, self.slots)]
            pl.when(awaited < self.count)(lambda: plgpu.barrier_wait(arrival))
            carry = step(n, slot, carry)
            plgpu.commit_smem()
            put(n, slot)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            self._start(n + self.slots - 1)
            return carry

        carry = lax.fori_loop(0, self.count, body, carry)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return carry

    def _start(self, n) -> None:
        pl.when(n < self.count)(lambda: self.fetch(n, lax.rem(n, self.slots)))


def kernel(body: Callable, name: str, blocks: int, out_type: list, scratch: list) -> Callable:
    """Return a kernel of `blocks` blocks of one warpgroup."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )

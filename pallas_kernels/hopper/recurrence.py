"""The matrix recurrence token by token on Hopper: the forward pass (see `ops/hopper/recurrence.py`).

    u_t = S_{t-1}^T a_t        S_t = diag(w_t) S_{t-1} + b_t u_t^T + k_t v_t^T        o_t = scale S_t^T q_t

A warp holds the K x V state of a head, or a strip of its columns, in registers in fp32, and walks over the tokens in
tiles (`stream.py`). Nothing of the size of a state is read or written between the first token and the last, and no
exponent, inverse or sum over tokens is ever taken. Without a and b it is a gated linear attention.

A lane has four of 16 rows and four of 32 columns: sums over rows (u, o) take two shuffles, over columns three.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARPS, await_warp, like, load_global, load_shared, save

TILE_TOKENS = 8
"""Of a tile; T is a multiple of them."""
RING_SLOTS = 2
SHARE_ROWS, SHARE_COLUMNS = 16, 32
"""What a lane's share is taken of: lanes lie 4 by 8."""
LANE_VECTOR = 4
"""Rows, and columns, that lie beside each other in a lane."""
MAX_WARP_ELEMENTS = 4096
"""Most elements of a warp, 128 of a lane."""


@functools.partial(jax.jit, static_argnames=("scale", "with_reads"))
def forward(q, k, v, w, state, *ab, scale: float, with_reads: bool):
    """Return o like v, the state after the last token and, where asked for, u (B, T, H, V) fp32.

    Args:
      q, k: (B, T, H, K) bf16 or fp32; T is a multiple of 8, K is 32, 64 or 128.
      v: (B, T, H, V) in their dtype; V is 32, 64 or 128, at least K / 2; B H is a multiple of `Plan.heads`.
      w: (B, T, H, K) fp32.
      state: the state before the first token, (B, H, K, V) fp32.
      ab: a and b like w, or nothing.
    """
    plan = Plan.of(k, v)
    sources = [q, k, v, w, *ab]
    reads = [jax.ShapeDtypeStruct(v.shape, jnp.float32)] if with_reads else []
    state = plan.by_block(state)

    def body(*refs):
        source_refs, (state_ref, o_ref, last_ref), refs = split(refs, len(sources), 3)
        reads_refs, tiles, reads_tiles, [filled] = split(refs, len(reads), len(sources), len(reads))
        q_tile, k_tile, v_tile, w_tile, *ab_tiles = tiles
        at = plan.here()

        def fetch(n, slot):
            plan.copy_in(at, source_refs, tiles, filled, n, slot)

        ring = stream.Ring(plan.tiles, RING_SLOTS, filled, fetch)

        def token(slot, i, S):
            k, w = (plan.rows(tile, slot, i) for tile in (k_tile, w_tile))
            after = w * S + k * plan.columns(v_tile, slot, i)
            if ab:
                a, b = (plan.rows(tile, slot, i) for tile in ab_tiles)
                u = (a * S).sum(axis=3)
                after = after + b * plan.along(u)
                for tile in reads_tiles:
                    save_columns(tile.at[slot, :, i], u)
            o = (plan.rows(q_tile, slot, i) * after).sum(axis=3)
            await_warp()
            save_columns(v_tile.at[slot, :, i], scale * o)
            return after

        def step(n, slot, S):
            return lax.fori_loop(0, TILE_TOKENS, functools.partial(token, slot), S)

        def put(n, slot):
            plan.copy_out(at, [v_tile, *reads_tiles], [o_ref, *reads_refs], n, slot)

        block = lax.axis_index("block")
        S = ring.walk(step, put, load_global(state_ref.at[block], plan.layout))
        last_ref[block] = S

    out_type = [like(v), like(state), *reads]
    scratch = [*plan.tiles_of([*sources, *reads]), plan.barrier(sources)]
    kernel = stream.kernel(body, "recurrence_forward", plan.blocks, out_type, scratch)
    o, last, *u = kernel(*sources, state)
    return [o, plan.by_head(last), *u]


class Plan(NamedTuple):
    """How the work is cut: a block takes `heads` heads, each in `strips` strips of `width` columns, a warp for each.

    Attributes:
      shape: B, H, K and V.
      tiles: of a sequence.
    """

    shape: tuple[int, int, int, int]
    tiles: int
    heads: int
    strips: int
    width: int

    @classmethod
    def of(cls, k, v) -> "Plan":
        """Return the plan for (B, T, H, K) keys and (B, T, H, V) values."""
        batch, time, heads, keys = k.shape
        values = v.shape[-1]
        width = min(values, MAX_WARP_ELEMENTS // keys)
        strips = values // width
        return cls((batch, heads, keys, values), time // TILE_TOKENS, WARPS // strips, strips, width)

    @property
    def blocks(self) -> int:
        """Each takes the same number of heads."""
        return self.shape[0] * self.shape[1] // self.heads

    @property
    def states(self) -> tuple[int, int, int, int]:
        """The shape of a block's states."""
        return self.heads, self.strips, self.width, self.shape[2]

    @property
    def layout(self):
        """The layout of a block's states."""
        tiling = plgpu.Tiling(((self.heads, self.strips, SHARE_COLUMNS, SHARE_ROWS), (LANE_VECTOR, LANE_VECTOR)))
        warps = {-6: self.heads, -5: self.strips}
        return plgpu.Layout.TILED(tiling, warp_dims=more_than_one(warps), lane_dims=(-4, -3), vector_dim=-1)

    def by_block(self, state) -> jax.Array:
        """Return states (B, H, K, V) as (blocks, heads, strips, width, K)."""
        return jnp.swapaxes(state, 2, 3).reshape(self.blocks, *self.states)

    def by_head(self, state) -> jax.Array:
        """Undo `by_block`."""
        batch, heads, keys, values = self.shape
        return jnp.swapaxes(state.reshape(batch, heads, values, keys), 2, 3)

    def here(self) -> list[tuple[jax.Array, jax.Array]]:
        """Return the row of the batch and the number of each head of this block."""
        numbers = [lax.axis_index("block") * self.heads + n for n in range(self.heads)]
        return [(lax.div(n, self.shape[1]), lax.rem(n, self.shape[1])) for n in numbers]

    def tiles_of(self, arrays) -> list:
        """Return a ring of tiles (heads, TILE_TOKENS, .) of each array (B, T, H, .)."""
        return [plgpu.SMEM((RING_SLOTS, self.heads, TILE_TOKENS, x.shape[-1]), x.dtype) for x in arrays]

    def barrier(self, sources):
        """Return the barriers of a ring."""
        return plgpu.Barrier(num_arrivals=len(sources) * self.heads, num_barriers=RING_SLOTS)

    def copy_in(self, at, sources, tiles, filled, n, slot) -> None:
        """Start the copies of tile n of each source into a slot."""
        for source, tile in zip(sources, tiles, strict=True):
            for number, (row, head) in enumerate(at):
                tokens = source.at[row, pl.ds(n * TILE_TOKENS, TILE_TOKENS), head]
                plgpu.copy_gmem_to_smem(tokens, tile.at[slot, number], filled.at[slot])

    def copy_out(self, at, tiles, targets, n, slot) -> None:
        """Start the copies of a slot to tile n of each target."""
        for target, tile in zip(targets, tiles, strict=True):
            for number, (row, head) in enumerate(at):
                tokens = target.at[row, pl.ds(n * TILE_TOKENS, TILE_TOKENS), head]
                plgpu.copy_smem_to_gmem(tile.at[slot, number], tokens, commit_group=False)

    def rows(self, tile, slot, i) -> jax.Array:
        """Load one value per row of a token, repeated over the columns, in fp32."""
        x = load_shared(tile.at[slot, :, i], self.layout.reduce((1, 2)))
        return lax.broadcast_in_dim(x, self.states, [0, 3])

    def columns(self, tile, slot, i) -> jax.Array:
        """Load one value per column of a token, repeated over the rows, in fp32."""
        return self.along(load_columns(tile.at[slot, :, i], self.states[:3], self.layout.reduce((3,))))

    def along(self, columns) -> jax.Array:
        """Repeat one value per column over the rows."""
        return lax.broadcast_in_dim(columns, self.states, [0, 1, 2])


def more_than_one(sizes: dict[int, int]) -> tuple[int, ...]:
    """Return the dimensions over which warps differ; layouts may name no other."""
    return tuple(dimension for dimension, size in sizes.items() if size > 1)


def load_columns(ref, shape, layout) -> jax.Array:
    """Load (heads, V) from shared memory as (heads, strips, width) in fp32."""
    return load_shared(ref.reshape(*shape), layout)


def save_columns(ref, x) -> None:
    """Store (heads, strips, width) to shared memory, (heads, V)."""
    save(ref.reshape(*x.shape), x)

"""Decoding with Taylor attention on Hopper: a few tokens behind a state and recent tokens (see `ops/taylor_decode.py`).

A block takes one head of one row. The state's values (153, V) come to shared memory at once, and what they are read by
is made meanwhile (`taylor_lanes.py`): each row of the state, and each recent token's values, have a weight for each
query, and the outputs are sums of weighted rows. The state is written only where the recent tokens are added to it,
in place, in shared memory; then it goes back as it came.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import across, down, keep_plain, like, load_global, save
from pallas_kernels.hopper.taylor_lanes import (
    EXPANDED_DIM,
    FEATURE_DIM,
    FIRST_SHARED,
    FIRST_SLOTS,
    LANES,
    LAST_TILE,
    PER_LANE,
    SLOTS,
    TILE_ROWS,
    features,
    read_rows,
    write_rows,
)

FEW_TOKENS = 2
"""Recent tokens that are added to a state together, but where all are, lest it is rounded more than once."""
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""What the largest value of a row is scaled to, by the dtype of a state's values."""

_TILING = plgpu.Tiling(((TILE_ROWS, 16), (4, 16), (2,)))
ROWS = plgpu.Layout.TILED(_TILING, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
"""The layout of a tile of 16 rows: 4 a warp, of which 8 lanes have pairs of columns each."""
PER_ROW, PER_COLUMN = ROWS.reduce(1), ROWS.reduce(0)


@jax.jit
def decode(q, k, v, values, scales, normaliser, recent_k, recent_v, count):
    """Return o (B, T, H, V) like v and, in place, what else is given from `values` to `recent_v`, after the tokens.

    Args:
      q, k: (B, T, H, 16) bf16.
      v: (B, T, H, V) bf16; V is a multiple of 16.
      values: (B, H, 153, V), fp32, bf16, or a dtype of `LARGEST`.
      scales: (B, H, 153) fp32, None where values are as they are.
      normaliser: (B, H, 153) fp32.
      recent_k, recent_v: (B, H, W, 16) and (B, H, W, V) bf16; W is a multiple of 16, at least T.
      count: recent tokens of each row (B,) int32; where T more have no room they are added to the state first.
    """
    plan, given = Plan.of(v, values, recent_v), [] if scales is None else [scales]
    refs = [jax.new_ref(x) for x in (values, *given, normaliser, recent_k, recent_v)]

    def body(q_ref, k_ref, v_ref, count_ref, *refs):
        state, [o_ref], tiles = split(refs, 4 + len(given), 1)
        Step(plan, (q_ref, k_ref, v_ref), count_ref, state, tiles).run(o_ref)

    kernel = stream.kernel(body, "taylor_decode", plan.batch * plan.heads, [like(v)], plan.scratch(recent_k))
    [o] = kernel(q, k, v, count, *refs)
    return [o, *(ref[...] for ref in refs)]


class Plan(NamedTuple):
    """B, T, H, V, the dtype of a state's values, and W."""

    batch: int
    tokens: int
    heads: int
    value_dim: int
    dtype: jnp.dtype
    room: int

    @classmethod
    def of(cls, v, values, recent_v) -> "Plan":
        """Return the plan for these arrays."""
        batch, tokens, heads, value_dim = v.shape
        return cls(batch, tokens, heads, value_dim, values.dtype, recent_v.shape[2])

    @property
    def largest(self) -> float:
        """What rows of the state are scaled to, 0 where they are not."""
        return LARGEST.get(self.dtype.name, 0.0)

    @property
    def group(self) -> int:
        """Recent tokens that are added together."""
        return FEW_TOKENS if self.dtype == jnp.float32 else self.room

    def scratch(self, recent_k) -> list:
        """Return tiles of the state and of recent keys and values, weights, what a row has beside, and a barrier."""
        rows = plgpu.SMEM((SLOTS,), jnp.float32)
        return [
            plgpu.SMEM((EXPANDED_DIM, self.value_dim), self.dtype),
            plgpu.SMEM((self.room, FEATURE_DIM), recent_k.dtype),
            plgpu.SMEM((self.room, self.value_dim), recent_k.dtype),
            plgpu.SMEM((max(self.tokens, self.group), SLOTS), jnp.float32),
            *[rows] * (1 + (self.largest > 0)),
            plgpu.Barrier(num_arrivals=3),
        ]


class Step:
    """A block's work, on its head of its row."""

    def __init__(self, plan: Plan, tokens, count_ref, state, tiles):
        self.plan = plan
        block = lax.axis_index("block")
        self.place = row, head = lax.div(block, plan.heads), lax.rem(block, plan.heads)
        self.q, *self.new = (ref.at[row, :, head] for ref in tokens)
        self.values, *beside, recent_k, recent_v = (ref.at[row, head] for ref in state)
        self.beside, self.recent = beside, (recent_k, recent_v)
        self.values_tile, self.k_tile, self.v_tile, self.weights, *self.beside_slots, self.filled = tiles
        *self.scale_slots, self.normaliser_slots = self.beside_slots
        self.count = count_ref[row]

    def run(self, o_ref) -> None:
        """Read and write what there is; what lies in global memory is read before the first wait."""
        plan, tiles = self.plan, (self.values_tile, self.k_tile, self.v_tile)
        for source, tile in zip((self.values, *self.recent), tiles, strict=True):
            plgpu.copy_gmem_to_smem(source, tile, self.filled)
        keep_plain(*tiles, self.weights)
        new = [[load_global(ref.at[t], PER_COLUMN) for t in range(plan.tokens)] for ref in self.new]
        queries = [load_global(self.q.at[t], PER_COLUMN).astype(jnp.float32) for t in range(plan.tokens)]
        for ref, slots in zip(self.beside, self.beside_slots, strict=True):
            put(slots, read_rows(ref))
        phi = features(self.q)
        plgpu.barrier_wait(self.filled)
        is_full = self.count + plan.tokens > plan.room
        pl.when(is_full)(self.flush)
        before = jnp.where(is_full, 0, self.count)
        self.append(new, before)
        totals = self.weigh(phi)
        plgpu.commit_smem()
        row, head = self.place
        for t, o in enumerate(self.read(queries, totals, before)):
            save(o_ref.at[row, t, head], o)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def flush(self) -> None:
        """Add the recent tokens to the state."""

        @pl.loop(0, self.plan.room, step=self.plan.group)
        def add_group(first):
            self.expand(first)
            plgpu.commit_smem()
            few = self.few_values(first) if self.plan.group == FEW_TOKENS else None
            self.add(LAST_TILE, FIRST_SHARED, few)
            plgpu.commit_smem()  # the last tile shares rows with the one before
            pl.loop(0, FIRST_SHARED, step=TILE_ROWS)(lambda row: self.add(row, row, few))
            plgpu.commit_smem()

        plgpu.copy_smem_to_gmem(self.values_tile, self.values)
        for ref, slots in zip(self.beside, self.beside_slots, strict=True):
            write_rows(ref, get(slots))

    def expand(self, first) -> None:
        """Write the features of a group's keys, 0 of those that are none, and add them to the normaliser."""

        def expand_few(i, totals):
            few = first + i * FEW_TOKENS
            for n, phi in enumerate(features(self.k_tile.at[pl.ds(few, FEW_TOKENS)])):
                held = lax.broadcast(few + n < self.count, (LANES,))
                kept = [jnp.where(held, x, 0.0) for x in phi]
                put(self.weights.at[i * FEW_TOKENS + n], kept)
                totals = [total + x for total, x in zip(totals, kept, strict=True)]
            return totals

        totals = lax.fori_loop(0, self.plan.group // FEW_TOKENS, expand_few, get(self.normaliser_slots))
        plgpu.commit_smem()  # two lanes may have a slot: both have read it
        put(self.normaliser_slots, totals)

    def few_values(self, first) -> list[jax.Array]:
        """Return the values of a few recent tokens."""
        return [load(self.v_tile.at[first + i], PER_COLUMN) for i in range(FEW_TOKENS)]

    def add(self, row, slot, few: list[jax.Array] | None) -> None:
        """Add a group's products of features and values to a tile of the state; `few` are its values, if so few."""
        tile = self.values_tile.at[pl.ds(row, TILE_ROWS)]
        shape, slots = (TILE_ROWS, self.plan.value_dim), pl.ds(slot, TILE_ROWS)
        x = load(tile, ROWS)
        for scales in self.scale_slots:
            x = x * across(load(scales.at[slots], PER_ROW), shape)

        def add_few(n, x, few):
            for i, v in enumerate(few):
                x = x + across(load(self.weights.at[n + i, slots], PER_ROW), shape) * down(v, shape)
            return x

        if few is None:
            turns = self.plan.group // FEW_TOKENS
            x = lax.fori_loop(0, turns, lambda n, x: add_few(n * FEW_TOKENS, x, self.few_values(n * FEW_TOKENS)), x)
        else:
            x = add_few(0, x, few)
        for scales in self.scale_slots:
            top = jnp.max(jnp.abs(x), axis=1)
            save(scales.at[slots], top * (1.0 / self.plan.largest))
            x = x * across(self.plan.largest / jnp.maximum(top, 1e-30), shape)
            x = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN) if self.plan.dtype == jnp.int8 else x
        save(tile, x)

    def append(self, new, before) -> None:
        """Write new keys and values behind `before` recent ones."""
        for rows, tile, target in zip(new, (self.k_tile, self.v_tile), self.recent, strict=True):
            for t, x in enumerate(rows):
                for ref in (tile, target):
                    ref.at[before + t][...] = x

    def weigh(self, features_of_queries) -> list[jax.Array]:
        """Write what each row of the state counts for each query; return their sums of what the normaliser counts."""
        scales, normaliser, totals = [get(slots) for slots in self.scale_slots], get(self.normaliser_slots), []
        is_second = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=PER_LANE) >= LANES - FIRST_SLOTS[1]
        for t, phi in enumerate(features_of_queries):
            first, second = (x * z for x, z in zip(phi, normaliser, strict=True))
            totals.append(jnp.sum(first + jnp.where(is_second, second, 0.0)))
            weights = list(phi)
            for scale in scales:
                weights = [x * y for x, y in zip(weights, scale, strict=True)]
            put(self.weights.at[t], weights)
        return totals

    def read(self, queries, totals, before) -> list[jax.Array]:
        """Return each query's output (V), from the weighed rows of the state, their totals, and recent tokens."""
        shape = TILE_ROWS, self.plan.value_dim

        def add_tile(i, numerators):
            x = load(self.values_tile.at[pl.ds(jnp.minimum(i * TILE_ROWS, LAST_TILE), TILE_ROWS)], ROWS)
            slots = pl.ds(i * TILE_ROWS, TILE_ROWS)
            return [
                total + across(load(self.weights.at[t, slots], PER_ROW), shape) * x
                for t, total in enumerate(numerators)
            ]

        numerators = [jnp.zeros(shape, jnp.float32) for _ in queries]
        numerators = lax.fori_loop(0, SLOTS // TILE_ROWS, add_tile, numerators)
        number = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=PER_ROW)

        def add_recent(i, sums):
            tokens = pl.ds(i * TILE_ROWS, TILE_ROWS)
            k, v = (load(tile.at[tokens], ROWS) for tile in (self.k_tile, self.v_tile))
            after = []
            for t, (q, (numerator, denominator)) in enumerate(zip(queries, sums, strict=True)):
                s = jnp.sum(k * down(q, k.shape), axis=1) * FEATURE_DIM**-0.5
                p = jnp.where(number + i * TILE_ROWS <= before + t, 1.0 + s * (1.0 + 0.5 * s), 0.0)
                after.append((numerator + across(p, shape) * v, denominator + p))
            return after

        sums = [(x, jnp.zeros(TILE_ROWS, jnp.float32)) for x in numerators]
        sums = lax.fori_loop(0, self.plan.room // TILE_ROWS, add_recent, sums)
        return [
            (jnp.sum(x, axis=0) * (1.0 / (jnp.sum(z) + total))).astype(self.q.dtype)
            for (x, z), total in zip(sums, totals, strict=True)
        ]


def load(ref, layout) -> jax.Array:
    """Load an array of shared memory in fp32."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def get(slots) -> list[jax.Array]:
    """Return the values of each lane's slots (SLOTS)."""
    return [plgpu.load(slots.at[pl.ds(first, LANES)], layout=PER_LANE, optimized=False) for first in FIRST_SLOTS]


def put(slots, values) -> None:
    """Undo `get`; what two lanes have is equal."""
    for first, x in zip(FIRST_SLOTS, values, strict=True):
        slots.at[pl.ds(first, LANES)][...] = x

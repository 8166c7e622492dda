"""Decoding with Taylor attention on TPUs: a few tokens behind a state and recent tokens (see `ops/taylor_decode.py`).

Rows of the batch lie on lanes and values on sublanes, as XLA lays out states of 128 rows or more by itself, so that
nothing is padded, turned over or summed across a register: an output is a sum of the state's features (V, B), each
times one weight a row. A program takes a head of a tile of rows, and some of its features after others. The pipeline
brings each state once; it is written where recent tokens are added to it, in the buffer that it came to, and goes back
from there to where it lies.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import split

LANES = 128
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""What the largest value of a feature is scaled to, by the dtype of a state's values."""
TILE, FP32_BYTES = 16, 4
"""Sublanes to which arrays are filled up, at least, and bytes of an element."""
MAX_VMEM_BYTES, MAX_BLOCK_BYTES = 14 << 20, 4 << 20
"""Of a program, where a kernel may take 16 MiB; and of its features of the state, of which VMEM holds two blocks."""
MAX_UNROLLED, MAX_UNROLLED_TOKENS = 17, 4
"""Features of a loop's turn, and recent tokens."""
EXACT = lax.Precision.HIGHEST


@jax.jit
def decode(q, k, v, values, scales, normaliser, recent_k, recent_v, count, before):
    """Return o (T, H, V, B) like v and, in place, what else is given from `values` to `recent_v`, after the tokens.

    Args:
      q, k: (T, H, K, B) bf16 or fp32.
      v: (T, H, V, B).
      values: (H, E, V, B), fp32, bf16, or a dtype of `LARGEST`; E = 1 + K + K (K + 1) / 2.
      scales: (H, E, B) fp32, None where values are as they are.
      normaliser: (H, E, B) fp32.
      recent_k, recent_v: (H, W, K, B) and (H, W, V, B) like q; W is at least T.
      count: recent tokens of each row (B,) int32.
      before: the same, or 0 of a row (B,): then its recent tokens are added to the state first.
    """
    held = [values, *([] if scales is None else [scales]), normaliser, recent_k, recent_v]
    plan = Plan.of(q, v, held)
    bounds = jnp.stack([jnp.any(before != count).astype(jnp.int32), before.min(), before.max() + plan.tokens])
    tables = feature_tables(q.shape[2], plan.chunk, q.dtype)
    counts, varying = jnp.stack([count, before]), jax.typeof(v).manual_axis_type

    def body(bounds_ref, counts_ref, *refs):
        tokens, tables, blocks, [o_ref], targets, scratch = split(refs, 3, 2, len(held), 1, len(held))
        Step(plan, (bounds_ref, counts_ref), tokens, tables, blocks, targets, scratch).run(o_ref)

    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in (v, *held)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=plan.grid,
            in_specs=[
                *(plan.of_rows(counts), *map(plan.of_tokens, (q, k, v)), *map(plan.of_table, tables)),
                *(plan.of_chunk(values), *map(plan.of_head, held[1:])),
            ],
            out_specs=[plan.of_tokens(v), *[pl.BlockSpec(memory_space=pl.ANY)] * len(held)],
            scratch_shapes=plan.scratch(v),
        ),
        input_output_aliases={7 + i: 1 + i for i in range(len(held))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="taylor_decode",
    )(bounds, counts, q, k, v, *tables, *held)


def feature_tables(keys: int, chunk: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Return by chunks of features what chooses both factors (2, ., K); what is added to each, and weights (3, ., 1).

    The features are those of `ops/taylor.py`, in its order.
    """
    m, n = np.tril_indices(keys)
    one, channels, weights = np.zeros((1, keys)), np.eye(keys), np.where(m == n, 0.5, 1.0) ** 0.5
    first = np.concatenate([one, channels, channels[m]])
    second = np.concatenate([one, 0 * channels, channels[n]])
    place = np.arange(len(first))
    weight = np.concatenate([[1.0], np.full(keys, keys**-0.25), weights * keys**-0.5])
    choices = np.stack([first, second]).reshape(2, -1, chunk, keys).swapaxes(0, 1)
    beside = np.stack([place < 1, place <= keys, weight]).reshape(3, -1, chunk, 1).swapaxes(0, 1)
    return jnp.asarray(choices, dtype), jnp.asarray(beside, jnp.float32)


class Plan(NamedTuple):
    """B, H, T, K, V, W, the dtype of a state's values and that of tokens; and how the work is cut."""

    rows: int
    heads: int
    tokens: int
    keys: int
    values: int
    room: int
    dtype: jnp.dtype
    token_dtype: jnp.dtype

    @classmethod
    def of(cls, q, v, held) -> "Plan":
        """Return the plan for these arrays."""
        (tokens, heads, keys, rows), values = q.shape, v.shape[2]
        return cls(rows, heads, tokens, keys, values, held[-1].shape[1], held[0].dtype, q.dtype)

    @property
    def features(self) -> int:
        """E."""
        return (self.keys + 1) * (self.keys + 2) // 2

    @property
    def lanes(self) -> int:
        """Rows of a program: all, where they do not fill registers."""
        return LANES if self.rows % LANES == 0 else self.rows

    @property
    def most_features(self) -> int:
        """How many features of the state a program may take at once; none of a call that VMEM does not hold."""
        values, registers = self.values + TILE, -(-self.lanes // LANES) * LANES
        tokens = (self.room + 2 * self.tokens) * (self.keys + self.values + TILE) * self.token_dtype.itemsize
        beside = 2 * self.features * FP32_BYTES
        sums = self.tokens * (values + TILE) * FP32_BYTES
        of_state, of_tokens = values * self.dtype.itemsize, (self.tokens + self.room) * FP32_BYTES
        left = MAX_VMEM_BYTES // registers - (2 * (tokens + beside) + sums)
        return min(left // (2 * of_state + of_tokens), MAX_BLOCK_BYTES // (of_state * registers))

    @property
    def chunk(self) -> int:
        """Features that a program takes at once."""
        return largest_divisor(self.features, self.most_features)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tiles of rows, heads, and chunks of features."""
        return self.rows // self.lanes, self.heads, self.features // self.chunk

    @property
    def largest(self) -> float:
        """What features of the state are scaled to, 0 where they are not."""
        return LARGEST.get(self.dtype.name, 0.0)

    def of_rows(self, x) -> pl.BlockSpec:
        """Return a program's block of (., B)."""
        return pl.BlockSpec((x.shape[0], self.lanes), lambda tile, head, chunk, _: (0, tile))

    def of_tokens(self, x) -> pl.BlockSpec:
        """Return a program's block of (T, H, ., B)."""
        block = x.shape[0], 1, x.shape[2], self.lanes
        return pl.BlockSpec(block, lambda tile, head, chunk, _: (0, head, 0, tile))

    def of_table(self, x) -> pl.BlockSpec:
        """Return a program's block of `feature_tables`."""
        return pl.BlockSpec((1, *x.shape[1:]), lambda tile, head, chunk, _: (chunk, 0, 0, 0))

    def of_chunk(self, x) -> pl.BlockSpec:
        """Return a program's block of (H, E, V, B)."""
        block = 1, self.chunk, x.shape[2], self.lanes
        return pl.BlockSpec(block, lambda tile, head, chunk, _: (head, chunk, 0, tile))

    def of_head(self, x) -> pl.BlockSpec:
        """Return a program's block of (H, ..., B)."""
        middle = x.shape[1:-1]
        block = 1, *middle, self.lanes
        return pl.BlockSpec(block, lambda tile, head, chunk, _: (head, *[0] * len(middle), tile))

    def scratch(self, v) -> list:
        """Return features of tokens and of recent ones, outputs and their normalisers so far, and a semaphore."""
        fp32 = [(self.tokens, self.chunk), (self.room, self.chunk), (self.tokens, v.shape[2]), (self.tokens, 1)]
        return [*(pltpu.VMEM((*x, self.lanes), jnp.float32) for x in fp32), pltpu.SemaphoreType.DMA]


class Step:
    """A program's work, on some features of a head of its rows."""

    def __init__(self, plan: Plan, counts, tokens, tables, blocks, targets, scratch):
        self.plan = plan
        tile, head, self.number = (pl.program_id(i) for i in range(3))
        self.is_full, self.first_new, self.end_new = (counts[0][i] for i in range(3))
        self.count, self.before = counts[1].at[pl.ds(0, 1)], counts[1].at[pl.ds(1, 1)]
        self.q, self.k, self.v = (ref.at[:, 0] for ref in tokens)
        self.choices, self.beside = (ref.at[0] for ref in tables)
        self.blocks = [ref.at[0] for ref in blocks]
        self.values, *self.scales, self.normaliser, self.recent_k, self.recent_v = self.blocks
        rows = pl.ds(tile * plan.lanes, plan.lanes) if plan.grid[0] > 1 else slice(None)  # copies begin at a tile
        features = pl.ds(self.number * plan.chunk, plan.chunk)
        values, *rest = (ref.at[head] for ref in targets)
        self.targets = [values.at[features, :, rows], *(x.at[..., rows] for x in rest)]
        self.phi_q, self.phi_k, self.sums, self.totals, self.semaphore = scratch

    def run(self, o_ref) -> None:
        """Make room where there is none, read the state, and with its last features recent tokens."""
        is_first, is_last = self.number == 0, self.number == pl.num_programs(2) - 1
        pl.when(self.is_full == 1)(self.flush)
        pl.when(is_first)(self.begin)
        self.read_state()
        pl.when(is_last)(self.append)
        pl.when(is_last)(functools.partial(self.finish, o_ref))
        pl.when(self.is_full == 1)(lambda: self.copy(0).wait())

    def begin(self) -> None:
        """Begin outputs."""
        self.sums[...] = jnp.zeros(self.sums.shape, jnp.float32)
        self.totals[...] = jnp.zeros(self.totals.shape, jnp.float32)

    def features(self, x):
        """Return this program's features of (K, B)."""
        precision = EXACT if x.dtype == jnp.float32 else None
        a, b = (jnp.dot(self.choices[i], x, precision=precision, preferred_element_type=jnp.float32) for i in range(2))
        return (a + self.beside[0]) * (b + self.beside[1]) * self.beside[2]

    def flush(self) -> None:
        """Add the recent tokens of rows that have no room to the state."""
        added = jnp.where(self.before[...] < self.count[...], self.count[...], 0)

        @pl.loop(0, self.plan.room)
        def expand(w):
            self.phi_k[w] = jnp.where(w < added, self.features(self.recent_k[w]), 0.0)

        pl.loop(0, self.plan.chunk)(self.add)
        self.copy(0).start()

    def add(self, feature) -> None:
        """Add the recent tokens of rows that have no room to a feature of the state."""
        of_head, is_full = pl.ds(self.number * self.plan.chunk + feature, 1), self.before[...] < self.count[...]
        held = x = self.values[feature].astype(jnp.float32)
        for scales in self.scales:
            x = x * scales[of_head]

        def add_token(w, sums):
            x, total = sums
            phi = self.phi_k[w, pl.ds(feature, 1)]
            return x + phi * self.recent_v[w].astype(jnp.float32), total + phi

        x, self.normaliser[of_head] = lax.fori_loop(0, self.plan.room, add_token, (x, self.normaliser[of_head]))
        for scales in self.scales:
            top = jnp.max(jnp.abs(x), axis=0, keepdims=True)
            scales[of_head] = jnp.where(is_full, top * (1.0 / self.plan.largest), scales[of_head])
            x = x * (self.plan.largest / jnp.maximum(top, 1e-30))
            x = jnp.where(is_full, jnp.round(x) if self.plan.dtype == jnp.int8 else x, held)
        self.values[feature] = x.astype(self.plan.dtype)

    def read_state(self) -> None:
        """Add to the outputs what these features count."""
        for t in range(self.plan.tokens):
            self.phi_q[t] = self.features(self.q[t])
            self.read_for(t)

    def read_for(self, t: int) -> None:
        """Add to a token's output what these features count."""
        unrolled = largest_divisor(self.plan.chunk, MAX_UNROLLED)

        def add_features(n, sums):
            x, total = sums
            for i in range(unrolled):
                feature = n * unrolled + i
                of_head = pl.ds(self.number * self.plan.chunk + feature, 1)
                phi = self.phi_q[t, pl.ds(feature, 1)]
                total = total + phi * self.normaliser[of_head]
                for scales in self.scales:
                    phi = phi * scales[of_head]
                x = x + phi * self.values[feature].astype(jnp.float32)
            return x, total

        so_far = self.sums[t], self.totals[t]
        self.sums[t], self.totals[t] = lax.fori_loop(0, self.plan.chunk // unrolled, add_features, so_far)

    def append(self) -> None:
        """Write new keys and values behind the recent ones, and where something was added to the state, that."""

        @pl.loop(self.first_new, self.end_new)
        def write(w):
            for new, recent in ((self.k, self.recent_k), (self.v, self.recent_v)):
                x = recent[w]
                for t in range(self.plan.tokens):
                    x = jnp.where(w == self.before[...] + t, new[t], x)
                recent[w] = x
            for copy in self.copies_of_token(w):
                copy.start()

        @pl.when(self.is_full == 1)
        def write_beside():
            for i in range(1, len(self.blocks) - 2):
                self.copy(i).start()

    def finish(self, o_ref) -> None:
        """Write the outputs, with what recent tokens count; wait for what is written."""
        for t in range(self.plan.tokens):
            x, total = self.with_recent(t)
            o_ref[t, 0] = (x / total).astype(o_ref.dtype)

        @pl.loop(self.first_new, self.end_new)
        def wait(w):
            for copy in self.copies_of_token(w):
                copy.wait()

        @pl.when(self.is_full == 1)
        def wait_beside():
            for i in range(1, len(self.blocks) - 2):
                self.copy(i).wait()

    def with_recent(self, t: int):
        """Return a token's output and its normaliser so far, with what recent tokens count."""
        unrolled, q = largest_divisor(self.plan.room, MAX_UNROLLED_TOKENS), self.q[t].astype(jnp.float32)

        def add_tokens(n, sums):
            x, total = sums
            for w in (n * unrolled + i for i in range(unrolled)):
                s = jnp.sum(self.recent_k[w].astype(jnp.float32) * q, axis=0, keepdims=True) * self.plan.keys**-0.5
                p = jnp.where(w <= self.before[...] + t, 1.0 + s * (1.0 + 0.5 * s), 0.0)
                x, total = x + p * self.recent_v[w].astype(jnp.float32), total + p
            return x, total

        return lax.fori_loop(0, pl.cdiv(self.end_new, unrolled), add_tokens, (self.sums[t], self.totals[t]))

    def copies_of_token(self, w) -> list:
        """Return the copies of a recent token to where it lies."""
        return [
            pltpu.make_async_copy(block.at[w], target.at[w], self.semaphore)
            for block, target in zip(self.blocks[-2:], self.targets[-2:], strict=True)
        ]

    def copy(self, i: int):
        """Return the copy of a block of the state to where it lies."""
        return pltpu.make_async_copy(self.blocks[i], self.targets[i], self.semaphore)


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number up to `most`, at least 1."""
    return next((size for size in range(min(number, most), 0, -1) if number % size == 0), 1)

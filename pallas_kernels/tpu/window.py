"""Softmax attention to a sliding window of at most 129 keys on TPUs: forward and gradients (see `ops/softmax.py`).

A tile of 128 queries sees keys of two tiles, its own and the one before. All of them are there at once: there is no
running maximum, and the backward pass, which reads q, k, v and do alone, makes the softmax again.

    p_st = exp(s_st - max_s s_st) / sum_s ..        o_t = sum_s p_st v_s
    ds_st = p_st (v_s . do_t - sum_s p_st v_s . do_t)        dq_t = sum_s ds_st k_s        dk_s = sum_t ds_st q_t

Tokens lie on lanes, (B, H, K, T), and keys of scores (S, T) on sublanes: sums over keys are additions of registers, and
head dims are not filled up to 128. Who sees whom is one number a query, the first key that it sees.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import split

TILE_TOKENS = 128
MAX_WINDOW = TILE_TOKENS + 1
HALF_TILE_WINDOW = TILE_TOKENS // 2 + 1
"""The longest with which half of the tile before is enough."""
MAX_BLOCK_TOKENS = 512
MAX_HEADS = 8
"""Of a program."""
UNROLLED_HEADS = 2
"""Of the forward pass, that one may wait for products while another computes."""
VMEM_BYTES = 48 << 20
HIDDEN_SCORE = -1e30
"""What is added to the score of a key that a query does not see."""
LOG2_E = 1.4426950408889634
BY_ROWS, BY_COLUMNS, PLAIN = ((0,), (0,)), ((1,), (1,)), ((1,), (0,))
"""Products that contract the first axes, the last ones, or the last with the first."""


class Plan(NamedTuple):
    """How a call is cut: heads and tokens of a program, keys of the tile before that a tile of queries sees."""

    heads: int
    tokens: int
    before: int

    @classmethod
    def of(cls, heads: int, time: int, window: int) -> "Plan":
        """Return that of a call."""
        group = next(n for n in range(min(MAX_HEADS, heads), 0, -1) if heads % n == 0)
        return cls(group, block_tokens(time), TILE_TOKENS // 2 if window <= HALF_TILE_WINDOW else TILE_TOKENS)

    @property
    def tiles(self) -> int:
        """Tiles of a program."""
        return self.tokens // TILE_TOKENS

    @property
    def keys(self) -> int:
        """Keys of which a tile's queries have a score each."""
        return self.before + TILE_TOKENS


def block_tokens(time: int) -> int:
    """Return the tokens of a program, of a multiple of which the kernels have as many: those that fill up least."""
    tiles = range(MAX_BLOCK_TOKENS, 0, -TILE_TOKENS)
    return min(tiles, key=lambda tokens: -time % tokens)


@functools.partial(jax.jit, static_argnames=("window", "scale"))
def forward(q, k, v, first, *, window: int, scale: float):
    """Return [o] like v, zero of a query that sees no key.

    Args:
      q, k: (B, H, K, T) bf16 or fp32, T a multiple of `block_tokens(T)`.
      v: (B, H, V, T) of the same dtype.
      first: (B or 1, 1, T) int32, the place of the first key that a query sees; of a query that sees none T or more.
      window: keys that a query sees at most; what `first` says may not exceed it.
      scale: of scores.
    """
    plan = Plan.of(q.shape[1], q.shape[3], window)

    def body(first_ref, q_ref, k_ref, v_ref, k_before_ref, v_before_ref, o_ref, hidden_ref):
        hide(hidden_ref, first_ref, plan, pl.program_id(2))

        def of_head(head, _):
            keys, values = (Tiles(*refs, head, plan) for refs in ((k_before_ref, k_ref), (v_before_ref, v_ref)))
            for tile in range(plan.tiles):
                p, total = softmax(q_ref[0, head, :, at(tile)], keys.seen(tile), hidden_ref[tile], scale)
                o = sum_of_parts(values.seen(tile), p.astype(v.dtype), plan)
                o_ref[0, head, :, at(tile)] = (o * total).astype(v.dtype)

        lax.fori_loop(0, plan.heads, of_head, None, unroll=math.gcd(plan.heads, UNROLLED_HEADS))

    grid = Grid(plan, q.shape, forwards=True)
    return grid.launch(body, (q, k, v), first, results=[v], name="window_forward")


@functools.partial(jax.jit, static_argnames=("window", "scale"))
def gradients(q, k, v, do, first, *, window: int, scale: float):
    """Return dq, dk and dv, of what `forward` takes and the gradient of o.

    Blocks come from the last one on: what the first tile of one gives to keys of the block before is kept for it.
    """
    plan = Plan.of(q.shape[1], q.shape[3], window)

    def body(first_ref, *refs):
        given, [k_before_ref, v_before_ref, dq_ref, dk_ref, dv_ref, hidden_ref, *kept] = split(refs, 4)
        q_ref, k_ref, v_ref, do_ref = given
        turn = pl.program_id(2)
        hide(hidden_ref, first_ref, plan, pl.num_programs(2) - 1 - turn)

        @pl.when(turn == 0)
        def _():
            for ref in kept:
                ref[...] = jnp.zeros_like(ref)

        def of_head(head, _):
            keys, values = (Tiles(*refs, head, plan) for refs in ((k_before_ref, k_ref), (v_before_ref, v_ref)))
            for tile in reversed(range(plan.tiles)):
                queries, cotangents = (ref[0, head, :, at(tile)] for ref in (q_ref, do_ref))
                p, total = softmax(queries, keys.seen(tile), hidden_ref[tile], scale)
                p = p * total
                dp = products(values.seen(tile), cotangents)
                ds = p * (dp - jnp.sum(p * dp, axis=0, keepdims=True)) * scale
                p, ds = p.astype(q.dtype), ds.astype(q.dtype)
                dq_ref[0, head, :, at(tile)] = sum_of_parts(keys.seen(tile), ds, plan).astype(q.dtype)
                for ref, after, tokens, weights in ((dk_ref, kept[0], queries, ds), (dv_ref, kept[1], cotangents, p)):
                    own = product(tokens, weights[plan.before :], BY_COLUMNS)
                    ref[0, head, :, at(tile)] = (own + after[head]).astype(ref.dtype)
                    after[head] = product(tokens, whole_tile(weights[: plan.before]), BY_COLUMNS)

        lax.fori_loop(0, plan.heads, of_head, None)

    kept = [pltpu.VMEM((plan.heads, x.shape[2], TILE_TOKENS), jnp.float32) for x in (k, v)]
    grid = Grid(plan, q.shape, forwards=False)
    return grid.launch(body, (q, k, v, do), first, results=[q, k, v], name="window_gradients", scratch=kept)


class Grid(NamedTuple):
    """A program for each block of tokens of each group of heads of a row, `forwards` or from the last one on."""

    plan: Plan
    shape: tuple[int, ...]
    forwards: bool

    def launch(self, body, tokens, first, *, results, name: str, scratch=()):
        """Run a body on blocks of tokens (B, H, ., T), q, k and v the first of them, and on the tiles before k's."""
        (rows, heads, _, time), (_, k, v, *_) = self.shape, tokens
        scores = rows * heads * time * self.plan.keys
        channels = sum(x.shape[2] for x in (*tokens, *results)) - k.shape[2] - v.shape[2]
        return pl.pallas_call(
            body,
            out_shape=list(map(like, results)),
            grid=(rows, heads // self.plan.heads, time // self.plan.tokens),
            in_specs=[self._firsts(first), *map(self._block, tokens), self._before(k), self._before(v)],
            out_specs=list(map(self._block, results)),
            scratch_shapes=[
                pltpu.VMEM((self.plan.tiles, self.plan.keys, TILE_TOKENS), jnp.float32),
                *scratch,
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * scores * channels,
                transcendentals=scores,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*tokens, *results)),
            ),
            name=name,
        )(first, *tokens, k, v)

    def _place(self, turn):
        return turn if self.forwards else self.shape[3] // self.plan.tokens - 1 - turn

    def _block(self, x) -> pl.BlockSpec:
        block = 1, self.plan.heads, x.shape[2], self.plan.tokens
        return pl.BlockSpec(block, lambda row, group, turn: (row, group, 0, self._place(turn)))

    def _before(self, x) -> pl.BlockSpec:
        """Return the tile before a block; of the first block any, since its queries see no key before it."""
        block = 1, self.plan.heads, x.shape[2], TILE_TOKENS
        tiles = self.plan.tiles
        return pl.BlockSpec(
            block, lambda row, group, turn: (row, group, 0, jnp.maximum(tiles * self._place(turn) - 1, 0))
        )

    def _firsts(self, x) -> pl.BlockSpec:
        of_rows = x.shape[0] > 1
        block = 1, 1, self.plan.tokens
        return pl.BlockSpec(block, lambda row, group, turn: (row if of_rows else 0, 0, self._place(turn)))


class Tiles(NamedTuple):
    """The keys, or the values, of a head of a block and of the tile before it."""

    before_ref: jax.Array
    own_ref: jax.Array
    head: jax.Array
    plan: Plan

    def seen(self, tile: int) -> list[jax.Array]:
        """Return those (., keys) of the tile before one of the block, as many as are seen, and its own."""
        ref, earlier = (self.own_ref, at(tile - 1)) if tile else (self.before_ref, at(0))
        hidden = TILE_TOKENS - self.plan.before
        return [ref[0, self.head, :, earlier][:, hidden:], self.own_ref[0, self.head, :, at(tile)]]


def like(x) -> jax.ShapeDtypeStruct:
    """Return what a result is like that varies over the devices of `jax.shard_map` as x does."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def at(tile: int) -> slice:
    """Return the tokens of a tile."""
    return slice(tile * TILE_TOKENS, (tile + 1) * TILE_TOKENS)


def hide(hidden_ref, first_ref, plan: Plan, block) -> None:
    """Write what is added to scores (tile, key, query) of a block, the same for all heads."""
    key, query = (lax.broadcasted_iota(jnp.int32, (plan.keys, TILE_TOKENS), axis) for axis in (0, 1))
    key = key - plan.before  # counted from the tile's first query
    for tile in range(plan.tiles):
        first = first_ref[0, :, at(tile)] - (block * plan.tokens + tile * TILE_TOKENS)
        hidden_ref[tile] = jnp.where((key <= query) & (key >= first), 0.0, HIDDEN_SCORE)


def softmax(queries, keys, hidden, scale: float):
    """Return exp(s - max s) of a tile's scores (S, T), and one over its sums (1, T), 0 where nothing is seen."""
    s = products(keys, queries) + hidden
    top = jnp.max(s, axis=0, keepdims=True)
    p = jnp.exp2((s - top) * (scale * LOG2_E))
    total = jnp.sum(p, axis=0, keepdims=True)
    return p, jnp.where(top > 0.5 * HIDDEN_SCORE, 1 / total, 0.0)


def products(parts, x):
    """Return the products (S, T) of all columns of the parts (., S) with those of x (., T)."""
    return jnp.concatenate([product(part, x, BY_ROWS) for part in parts], axis=0)


def sum_of_parts(parts, weights, plan: Plan):
    """Return the sums (., T) of columns of the parts (., S) by weights (S, T)."""
    return product(parts[0], weights[: plan.before], PLAIN) + product(parts[1], weights[plan.before :], PLAIN)


def whole_tile(weights):
    """Return weights of the last keys of a tile as those of all of it."""
    missing = TILE_TOKENS - weights.shape[0]
    return jnp.concatenate([jnp.zeros((missing, TILE_TOKENS), weights.dtype), weights]) if missing else weights


def product(a, b, axes):
    """Return a product summed in fp32, which is exact of fp32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)

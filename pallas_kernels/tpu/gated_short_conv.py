"""The gated short convolution between its projections on TPUs: each array is read and written once.

    [u, g] = x + b          a_t = sum_{s<W} k_s [age_t >= s] u_{t-s}          y_t = silu(a_t) g_t

`k_s` is the tap of the token s places before, and `age_t` how many tokens of t's document stand before it, -1 of
padding, which reads nothing and whose y is 0. Backwards, with a made anew:

    da_t = dy_t g_t silu'(a_t)          du_t = sum_s k_s [age_{t+s} >= s] da_{t+s}          dg_t = dy_t silu(a_t)

Channels lie on lanes, as the projections read and write them, and tokens on sublanes, over which a tap is a rotation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
PART_TOKENS = 64
"""Tokens whose registers are computed at once."""
EDGE_TOKENS = 16
"""Tokens of the block before, of the block after or of both that are read too: a tile of bf16."""
MAX_TAPS = 8
SUM_ROWS = 16
"""Of the array of the gradients' sums, which has a row a tap and one for the bias."""
BLOCK_TOKENS = 128, 256, 512
MAX_BLOCK_BYTES = 16 << 20
"""Of the blocks of a program."""
VMEM_BYTES = 48 << 20


class Plan(NamedTuple):
    """Tokens of a program, channels of each half, and taps."""

    tokens: int
    channels: int
    taps: int

    @classmethod
    def of(cls, x, kernel) -> "Plan":
        """Return that of arrays (B, T, 2 D) and (W, D)."""
        taps, channels = kernel.shape
        return cls(block_tokens(x.shape[1], channels, x.dtype.itemsize), channels, taps)

    @property
    def groups(self) -> int:
        """How many registers lie beside each other in a half."""
        return self.channels // LANES


def block_tokens(time: int, channels: int, itemsize: int) -> int:
    """Return the tokens of a program, of a multiple of which the kernels have as many: those that fill up least."""
    of_token = 2 * 5 * channels * itemsize  # each block twice, while the one before is computed
    fitting = [tokens for tokens in BLOCK_TOKENS if tokens * of_token <= MAX_BLOCK_BYTES] or BLOCK_TOKENS[:1]
    return min(reversed(fitting), key=lambda tokens: -time % tokens)


@jax.jit
def forward(x, kernel, bias, age):
    """Return [y] (B, T, D) like x.

    Args:
      x: (B, T, 2 D) bf16 or fp32, T a multiple of `block_tokens`, D of 128.
      kernel: (W, D) fp32, the last tap that of a token itself, W at most 8.
      bias: (1, 2 D) fp32.
      age: (B or 1, 1, T) int32.
    """
    plan = Plan.of(x, kernel)

    def body(age_ref, x_ref, before_ref, kernel_ref, bias_ref, y_ref, ages_ref):
        spread(ages_ref, age_ref)

        def of_group(group, _):
            own, gate = halves(group, plan)
            taps, biases = taps_of(kernel_ref, own), (bias_ref[:, own], bias_ref[:, gate])
            for begin in range(0, plan.tokens, PART_TOKENS):
                part = Part(x_ref, before_ref, ages_ref, begin)
                a = part.convolved(part.inputs(own, biases[0]), taps)
                y = a * jax.nn.sigmoid(a) * (part.read(x_ref, gate) + biases[1])
                y_ref[0, part.tokens, own] = jnp.where(part.age >= 0, y, 0.0).astype(y_ref.dtype)

        lax.fori_loop(0, plan.groups, of_group, None)

    walk = Walk(plan, x, forwards=True)
    y = jax.ShapeDtypeStruct((*x.shape[:2], plan.channels), x.dtype)
    specs = walk.ages(age), walk.block(2 * plan.channels), walk.before(), *map(walk.whole, (kernel, bias))
    arguments = age, x, x, kernel, bias
    return walk.launch(body, specs, [walk.block(plan.channels)], [y], arguments, "gated_short_conv_forward")


@jax.jit
def gradients(x, dy, kernel, bias, age):
    """Return dx like x, and the sums (B, 16, 2 D) fp32 of each row: a row a tap, of its first half, then the bias's.

    Blocks come from the last one on: da of a block's first tokens is kept for the block before it. The first sum is of
    the tap of a token itself.
    """
    plan = Plan.of(x, kernel)

    def body(age_ref, x_ref, before_ref, dy_ref, kernel_ref, bias_ref, dx_ref, sums_ref, ages_ref, after_ref, old_ref):
        spread(ages_ref, age_ref)

        @pl.when(pl.program_id(1) == 0)
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)
            after_ref[...] = jnp.zeros_like(after_ref)
            old_ref[...] = jnp.full_like(old_ref, -1)

        def of_group(group, _):
            own, gate = halves(group, plan)
            taps, biases = taps_of(kernel_ref, own), (bias_ref[:, own], bias_ref[:, gate])
            after, sums = Edge(after_ref[:, own], old_ref[...]), [jnp.zeros((8, LANES))] * (plan.taps + 2)
            for begin in reversed(range(0, plan.tokens, PART_TOKENS)):
                part = Part(x_ref, before_ref, ages_ref, begin)
                u = part.inputs(own, biases[0])
                a = part.convolved(u, taps)
                sigmoid = jax.nn.sigmoid(a)
                dy = jnp.where(part.age >= 0, part.read(dy_ref, own), 0.0)
                dg = dy * a * sigmoid
                da = dy * (part.read(x_ref, gate) + biases[1]) * sigmoid * (1 + a * (1 - sigmoid))
                du = after.convolved(da, part.age, taps)
                after = Edge(da[:EDGE_TOKENS], part.age[:EDGE_TOKENS])
                dx_ref[0, part.tokens, own] = du.astype(dx_ref.dtype)
                dx_ref[0, part.tokens, gate] = dg.astype(dx_ref.dtype)
                terms = *(da * part.earlier(u, s) for s in range(plan.taps)), du, dg
                sums = [total + term.reshape(-1, 8, LANES).sum(0) for total, term in zip(sums, terms, strict=True)]
            after_ref[:, own] = after.values
            *of_taps, of_input, of_gate = (jnp.sum(total, axis=0, keepdims=True) for total in sums)
            for row, total in enumerate((*of_taps, of_input)):
                sums_ref[0, row : row + 1, own] += total
            sums_ref[0, plan.taps : plan.taps + 1, gate] += of_gate

        lax.fori_loop(0, plan.groups, of_group, None)
        old_ref[...] = ages_ref[:EDGE_TOKENS]

    walk = Walk(plan, x, forwards=False)
    sums = jax.ShapeDtypeStruct((x.shape[0], SUM_ROWS, 2 * plan.channels), jnp.float32)
    tokens = walk.block(2 * plan.channels)
    specs = walk.ages(age), tokens, walk.before(), walk.block(plan.channels), *map(walk.whole, (kernel, bias))
    results = [tokens, pl.BlockSpec((1, SUM_ROWS, 2 * plan.channels), lambda row, turn: (row, 0, 0))]
    scratch = [
        pltpu.VMEM((EDGE_TOKENS, plan.channels), jnp.float32),
        pltpu.VMEM((EDGE_TOKENS, LANES), jnp.int32),
    ]
    arguments = age, x, x, dy, kernel, bias
    return walk.launch(body, specs, results, [x, sums], arguments, "gated_short_conv_gradients", scratch)


class Walk(NamedTuple):
    """A program for each block of tokens of a row, `forwards` or from the last one on."""

    plan: Plan
    x: jax.Array
    forwards: bool

    def launch(self, body, in_specs, out_specs, results, arguments, name: str, scratch=()):
        """Run a body."""
        rows, time, _ = self.x.shape
        varying = jax.typeof(self.x).manual_axis_type
        moved = sum(x.size * x.dtype.itemsize for x in (*arguments, *results)) - self.x.size * self.x.dtype.itemsize
        return pl.pallas_call(
            body,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in results],
            grid=(rows, time // self.plan.tokens),
            in_specs=list(in_specs),
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((self.plan.tokens, LANES), jnp.int32), *scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            cost_estimate=pl.CostEstimate(flops=0, transcendentals=self.x.size, bytes_accessed=moved),
            name=name,
        )(*arguments)

    def _place(self, turn):
        return turn if self.forwards else self.x.shape[1] // self.plan.tokens - 1 - turn

    def block(self, channels: int) -> pl.BlockSpec:
        """Return a block of tokens with all of so many channels."""
        return pl.BlockSpec((1, self.plan.tokens, channels), lambda row, turn: (row, self._place(turn), 0))

    def before(self) -> pl.BlockSpec:
        """Return the inputs of the last tokens before a block; of the first block any, since nothing reads them."""
        edges = self.plan.tokens // EDGE_TOKENS
        return pl.BlockSpec(
            (1, EDGE_TOKENS, self.plan.channels),
            lambda row, turn: (row, jnp.maximum(edges * self._place(turn) - 1, 0), 0),
        )

    def ages(self, age) -> pl.BlockSpec:
        """Return those of a block."""
        of_rows = age.shape[0] > 1
        return pl.BlockSpec((1, 1, self.plan.tokens), lambda row, turn: (row if of_rows else 0, 0, self._place(turn)))

    def whole(self, x) -> pl.BlockSpec:
        """Return all of a parameter."""
        return pl.BlockSpec(x.shape, lambda row, turn: (0, 0))


class Part(NamedTuple):
    """Some tokens of a block."""

    x_ref: jax.Array
    before_ref: jax.Array
    ages_ref: jax.Array
    begin: int

    @property
    def tokens(self) -> slice:
        """Their places in the block."""
        return slice(self.begin, self.begin + PART_TOKENS)

    @property
    def age(self):
        """How many tokens of its document stand before each, on all lanes."""
        return self.ages_ref[self.tokens]

    def read(self, ref, lanes):
        """Return theirs of an array, in fp32."""
        return ref[0, self.tokens, lanes].astype(jnp.float32)

    def inputs(self, lanes, bias):
        """Return their inputs u and those of the tokens before them."""
        at = slice(self.begin - EDGE_TOKENS, self.begin)
        earlier = self.x_ref[0, at, lanes] if self.begin else self.before_ref[0, :, lanes]
        return jnp.concatenate([earlier.astype(jnp.float32), self.read(self.x_ref, lanes)]) + bias

    def earlier(self, u, distance: int):
        """Return of each token the input so many places before it, 0 where its document has none."""
        moved = pltpu.roll(u, distance, 0) if distance else u
        return jnp.where(self.age >= distance, moved[EDGE_TOKENS:], 0.0)

    def convolved(self, u, taps):
        """Return a, of inputs that begin with those before."""
        return sum(tap * self.earlier(u, distance) for distance, tap in enumerate(taps))


class Edge(NamedTuple):
    """What stands behind some tokens: the first values da after them, and their ages."""

    values: jax.Array
    age: jax.Array

    def convolved(self, da, age, taps):
        """Return du of tokens with these da."""
        values, ages = (jnp.concatenate(both) for both in ((da, self.values), (age, self.age)))
        total = taps[0] * da
        for distance, tap in enumerate(taps[1:], 1):
            seen = jnp.where(ages >= distance, values, 0.0)
            total = total + tap * pltpu.roll(seen, seen.shape[0] - distance, 0)[: da.shape[0]]
        return total


def halves(group, plan: Plan):
    """Return the lanes of a group of channels, and of their gates."""
    return tuple(pl.ds(pl.multiple_of(at * LANES, LANES), LANES) for at in (group, plan.groups + group))


def taps_of(kernel_ref, lanes):
    """Return the taps (1, 128) by their distance."""
    return [kernel_ref[row : row + 1, lanes] for row in reversed(range(kernel_ref.shape[0]))]


def spread(ages_ref, age_ref) -> None:
    """Write the ages of a block's tokens, which come along lanes, along sublanes."""
    for begin in range(0, ages_ref.shape[0], LANES):
        along = jnp.broadcast_to(age_ref[0, :, begin : begin + LANES], (LANES, LANES))
        ages_ref[begin : begin + LANES] = along.T

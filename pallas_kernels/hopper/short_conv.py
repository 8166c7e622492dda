"""Short convolutions on Hopper, forward and backward (see `ops/conv.py` and `ops/gated_conv.py`).

    plain   y = f(conv(x) + bias)                                       f is SiLU or nothing
    gated   y = silu(conv(u)) gate       [u, gate] = x + bias           the halves of a projection

A block takes a strip of channels of a part of a sequence and walks over its tokens in tiles of 8 (`stream.py`). A
token's row of the strip is spread over the lanes, so that the inputs of the tokens before stay in registers: each pass
moves every element once.
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
from pallas_kernels.hopper.stream import WARPGROUP_LANES, load, sigmoid

UNREADABLE_REACH = -2
"""The reach of tokens whose outputs and gradients must be NaN."""
TILE_TOKENS = 8
"""Of a tile; T is a multiple of them."""
RING_SLOTS = 4
MAX_STRIP_ROWS = 4
"""Rows of 128 channels in a strip, at most."""
FORWARD_BLOCK_TOKENS, BACKWARD_BLOCK_TOKENS = 64, 128
"""Tokens of a block; the backward's are more since each block leaves sums of its own."""


class Form(NamedTuple):
    """Which convolution: plain or gated, with SiLU or without, with a bias or without."""

    gated: bool
    silu: bool
    bias: bool

    @property
    def halves(self) -> int:
        """Rows of channels of x for each of y."""
        return 1 + self.gated

    @property
    def name(self) -> str:
        """What the kernels' names begin with."""
        return "gated_conv" if self.gated else "short_conv"


@functools.partial(jax.jit, static_argnums=0)
def forward(form: Form, x, kernel, bias=None, reach=None):
    """Return y (B, T, I) bf16 of x (B, T, I) bf16, kernel (W, I) fp32 and any bias (I) fp32.

    If gated, x and bias are twice as wide. `reach` (B, T) int32 counts the earlier tokens that a token sees, at most
    W-1; it is -1 for padding, which gets 0, and `UNREADABLE_REACH` for what has no meaning here, which gets NaN. T is a
    multiple of 8, I of 128, W at least 2.
    """
    plan = _Plan.of(form, x, kernel, FORWARD_BLOCK_TOKENS)
    packed = plan.windows(reach)

    def body(x_ref, kernel_ref, *refs):
        bias_refs, reach_refs, (y_ref, tiles, filled, *reach_scratch) = split(refs, form.bias, len(packed))
        at = plan.here()

        def fetch(n, slot):
            for half, channels in enumerate(at.strips):
                source = x_ref.at[at.row, at.tokens(n), channels]
                plgpu.copy_gmem_to_smem(source, tiles.at[half, slot], filled.at[slot])

        ring = stream.Ring(at.tiles, RING_SLOTS, filled, fetch)
        weights = _Weights.of(form, kernel_ref, bias_refs, at)
        reaches = plan.reaches(at, reach_refs, reach_scratch)
        last = form.halves - 1

        def step(n, slot, past):
            for i in range(TILE_TOKENS):
                window = (*past, _plus(load(tiles.at[0, slot, i]), weights.before))
                seen = reaches(n * TILE_TOKENS + i)
                c = _convolve(_visible(window, seen), weights)
                y = c * sigmoid(c) if form.silu else c
                y = y * _plus(load(tiles.at[1, slot, i]), weights.gate) if form.gated else y
                tiles.at[last, slot, i][...] = _unless_padding(y, seen, packed).astype(x.dtype)
                past = window[1:]
            return past

        def put(n, slot):
            target = y_ref.at[at.row, at.tokens(n), at.strips[0]]
            plgpu.copy_smem_to_gmem(tiles.at[last, slot], target, commit_group=False)

        earlier = (_row(x_ref, at.row, at.first - j, at.strips[0]) for j in range(plan.taps - 1, 0, -1))
        ring.walk(step, put, tuple(_plus(row, weights.before) for row in earlier))

    out_type = [jax.ShapeDtypeStruct((*x.shape[:2], plan.width, WARPGROUP_LANES), x.dtype)]
    kernel_of = stream.kernel(body, f"{form.name}_forward", plan.blocks, out_type, plan.scratch(form.halves, packed))
    [y] = kernel_of(*map(_by_lanes, (x, kernel, *[bias] * form.bias)), *packed)
    return [y.reshape(*x.shape[:2], -1)]


@functools.partial(jax.jit, static_argnums=0)
def backward(form: Form, x, kernel, dy, bias=None, reach=None):
    """Return dx like x and sums (parts, W+1, I) fp32, W+2 if gated: of dkernel, and of any dbias or its halves.

    Arguments as of `forward`, and the gradient dy (B, T, I) of its result. Tokens are walked from the last to the
    first: what a token's convolution gives to the tokens before it waits in registers.
    """
    plan = _Plan.of(form, x, kernel, BACKWARD_BLOCK_TOKENS)
    packed = plan.windows(reach)

    def body(x_ref, kernel_ref, dy_ref, *refs):
        bias_refs, reach_refs, refs = split(refs, form.bias, len(packed))
        dx_ref, sums_ref, tiles, filled, *reach_scratch = refs
        at = plan.here()
        sources = *((x_ref, strip) for strip in at.strips), (dy_ref, at.strips[0])
        given = form.halves  # dy, and du in its place

        def tokens(n):
            return at.tokens(at.tiles - 1 - n)

        def fetch(n, slot):
            for kind, (ref, channels) in enumerate(sources):
                plgpu.copy_gmem_to_smem(ref.at[at.row, tokens(n), channels], tiles.at[kind, slot], filled.at[slot])

        ring = stream.Ring(at.tiles, RING_SLOTS, filled, fetch)
        weights = _Weights.of(form, kernel_ref, bias_refs, at)
        reaches = plan.reaches(at, reach_refs, reach_scratch)

        def token(window, gate, dy, seen, pending):
            """Return a token's visible inputs, the gradients of conv(u), u and gate, and what is given to those before.

            `pending` is what the tokens after it have given to it and to each of those before it.
            """
            window = _visible(window, seen)
            c = _convolve(window, weights)
            s = sigmoid(c) if form.silu else 1.0
            dc = dy * s * (1.0 + c - c * s) if form.silu else dy
            dc = dc * gate if form.gated else dc
            earlier = [_where(seen >= j, dc, 0.0) * weights.taps[-1 - j] for j in range(1, plan.taps)]
            later = [p + g for p, g in zip(pending[1:], earlier[:-1], strict=True)] + earlier[-1:]
            return window, dc, pending[0] + dc * weights.taps[-1], dy * c * s, later

        def step(n, slot, carry):
            pending, dtaps, dbias = carry
            inside, next_slot = n + 1 < at.tiles, lax.rem(n + 1, RING_SLOTS)
            rows = [
                _where(inside, _plus(load(tiles.at[0, next_slot, TILE_TOKENS - j]), weights.before), before)
                for j, before in zip(range(plan.taps - 1, 0, -1), past, strict=True)
            ]
            rows += [_plus(load(tiles.at[0, slot, i]), weights.before) for i in range(TILE_TOKENS)]
            for i in reversed(range(TILE_TOKENS)):
                seen = reaches((at.tiles - 1 - n) * TILE_TOKENS + i)
                gate = _plus(load(tiles.at[1, slot, i]), weights.gate) if form.gated else None
                dy = _unless_padding(load(tiles.at[given, slot, i]), seen, packed)
                window, dc, du, dgate, pending = token(rows[i : i + plan.taps], gate, dy, seen, pending)
                tiles.at[given, slot, i][...] = du.astype(x.dtype)
                if form.gated:
                    tiles.at[1, slot, i][...] = dgate.astype(x.dtype)
                dtaps = _sums(dtaps, [dc * u for u in window])
                if form.bias:
                    dbias = _sums(dbias, (du, dgate) if form.gated else (dc,))
            return pending, dtaps, dbias

        def put(n, slot):
            for kind, channels in zip((given, 1), at.strips, strict=False):
                target = dx_ref.at[at.row, tokens(n), channels]
                plgpu.copy_smem_to_gmem(tiles.at[kind, slot], target, commit_group=False)

        def row(t):
            return _plus(_row(x_ref, at.row, t, at.strips[0]), weights.before)

        def beyond(pending):
            """Return what the tokens after the part give to it."""
            for i in reversed(range(plan.taps - 1)):
                t, seen = at.first + plan.part + i, reaches(plan.part + i)
                gate = _plus(_row(x_ref, at.row, t, at.strips[1]), weights.gate) if form.gated else None
                dy = _where(t < plan.time, _row(dy_ref, at.row, t, at.strips[0]), 0.0)
                dy = _unless_padding(dy, seen, packed)
                window = [row(t - j) for j in range(plan.taps - 1, -1, -1)]
                *_, pending = token(window, gate, dy, seen, pending)
            return pending

        past = [row(at.first - j) for j in range(plan.taps - 1, 0, -1)]
        zero = jnp.zeros_like(weights.taps[0])
        carry = beyond([zero] * (plan.taps - 1)), [zero] * plan.taps, [zero] * (form.bias * form.halves)
        _, dtaps, dbias = ring.walk(step, put, carry, ahead=1)
        for w, total in enumerate([*dtaps, *dbias]):
            sums_ref.at[at.piece, w, at.strips[0]][...] = total

    parts, sums = plan.batch * plan.parts, plan.taps + form.bias * form.halves
    out_type = [
        jax.ShapeDtypeStruct((*x.shape[:2], form.halves * plan.width, WARPGROUP_LANES), x.dtype),
        jax.ShapeDtypeStruct((parts, sums, plan.width, WARPGROUP_LANES), jnp.float32),
    ]
    scratch = plan.scratch(form.halves + 1, packed)
    kernel_of = stream.kernel(body, f"{form.name}_backward", plan.blocks, out_type, scratch)
    dx, sums = kernel_of(*map(_by_lanes, (x, kernel, dy, *[bias] * form.bias)), *packed)
    return [dx.reshape(x.shape), sums.reshape(*sums.shape[:2], -1)]


class _Place(NamedTuple):
    """A block's row of the batch, part of all parts, first token, number of tiles, and rows of 128 channels of x.

    The first rows are those of y as well, the second ones those of the gate.
    """

    row: jax.Array
    piece: jax.Array
    first: jax.Array
    tiles: jax.Array
    strips: tuple[pl.Slice, ...]

    def tokens(self, tile) -> pl.Slice:
        return pl.ds(self.first + tile * TILE_TOKENS, TILE_TOKENS)


class _Plan(NamedTuple):
    """How the work of a form is cut: B, T, I / 128, W and the tokens of a part."""

    form: Form
    batch: int
    time: int
    width: int
    taps: int
    part: int

    @classmethod
    def of(cls, form: Form, x, kernel, part: int) -> "_Plan":
        batch, time, channels = x.shape
        return cls(form, batch, time, channels // (form.halves * WARPGROUP_LANES), kernel.shape[0], part)

    @property
    def rows(self) -> int:
        return stream.rows_per_lane(self.width * WARPGROUP_LANES, MAX_STRIP_ROWS)

    @property
    def parts(self) -> int:
        return pl.cdiv(self.time, self.part)

    @property
    def blocks(self) -> int:
        return self.batch * self.parts * self.width // self.rows

    def here(self) -> _Place:
        """Return this block's place; blocks of the same tokens follow each other."""
        block, strips = lax.axis_index("block"), self.width // self.rows
        strip, piece = lax.rem(block, strips) * self.rows, lax.div(block, strips)
        row, first = lax.div(piece, self.parts), lax.rem(piece, self.parts) * self.part
        tiles = lax.div(jnp.minimum(self.part, self.time - first), TILE_TOKENS)
        halves = tuple(pl.ds(half * self.width + strip, self.rows) for half in range(self.form.halves))
        return _Place(row, piece, first, tiles, halves)

    def windows(self, reach) -> list:
        """Return, where there are documents, their reaches up to a tile past the last part."""
        if reach is None:
            return []
        return [jnp.pad(reach, ((0, 0), (0, self.parts * self.part + TILE_TOKENS - self.time)), constant_values=-1)]

    def reaches(self, at: _Place, reach_refs, scratch):
        """Return the function from a token of the part, or one after it, to how many before it it sees."""
        if not scratch:
            return lambda i: jnp.minimum(at.first + i, self.taps - 1)
        [reach_ref], (tile, filled) = reach_refs, scratch
        plgpu.copy_gmem_to_smem(reach_ref.at[at.row, pl.ds(at.first, self.part + TILE_TOKENS)], tile, filled)
        plgpu.barrier_wait(filled)
        return lambda i: tile[i]

    def scratch(self, kinds: int, packed: list) -> list:
        """Return a ring of tiles of each kind of array, its barriers, and the reaches with theirs."""
        reach = [plgpu.SMEM((self.part + TILE_TOKENS,), jnp.int32), plgpu.Barrier()] if packed else []
        ring = plgpu.SMEM((kinds, RING_SLOTS, TILE_TOKENS, self.rows, WARPGROUP_LANES), jnp.bfloat16)
        return [ring, plgpu.Barrier(num_arrivals=kinds, num_barriers=RING_SLOTS), *reach]


def _by_lanes(x):
    return x.reshape(*x.shape[:-1], -1, WARPGROUP_LANES)


class _Weights(NamedTuple):
    """A strip's taps, and what is added before the convolution, after it, and to the gate, or None."""

    taps: list[jax.Array]
    before: jax.Array | None
    after: jax.Array | None
    gate: jax.Array | None

    @classmethod
    def of(cls, form: Form, kernel_ref, bias_refs, at: _Place) -> "_Weights":
        taps = [load(kernel_ref.at[w, at.strips[0]]) for w in range(kernel_ref.shape[0])]
        if not form.bias:
            return cls(taps, None, None, None)
        biases = [load(bias_refs[0].at[strip]) for strip in at.strips]
        return cls(taps, biases[0], None, biases[1]) if form.gated else cls(taps, None, biases[0], None)


def _row(ref, row, t, channels):
    """Return the nearest token's row to token t."""
    return load(ref.at[row, jnp.clip(t, 0, ref.shape[1] - 1), channels])


def _visible(window, seen):
    """Return a token's inputs, the oldest first, with zeros for those that it does not see."""
    reach = range(len(window) - 1, 0, -1)
    return [*(_where(seen >= j, u, 0.0) for j, u in zip(reach, window[:-1], strict=True)), window[-1]]


def _convolve(window, weights: _Weights):
    terms = [u * tap for u, tap in zip(window, weights.taps, strict=True)]
    return _plus(sum(terms[1:]) + terms[0], weights.after)


def _plus(x, bias):
    return x if bias is None else x + bias


def _sums(totals, values):
    return [total + x for total, x in zip(totals, values, strict=True)]


def _unless_padding(x, seen, packed: list):
    return _where(seen >= 0, x, jnp.where(seen == UNREADABLE_REACH, jnp.nan, 0.0)) if packed else x


def _where(condition, x, y):
    """Select by a scalar; a product with 0 or 1 would let infinities of other documents through."""
    return lax.select(jnp.broadcast_to(condition, x.shape), x, jnp.broadcast_to(y, x.shape))

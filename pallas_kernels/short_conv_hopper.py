"""Gated short convolution on Hopper, forward and backward: y = silu(conv(u)) gate (see `ops/gated_conv.py`).

u and gate are the halves of a projection x = [u, gate], to which a bias is still to be added. A block takes a strip of
channels of a part of a sequence and walks over its tokens in tiles of 8 (`stream.py`). A token's row of the strip is
spread over the lanes, so that the inputs of the tokens before stay in registers: each pass moves every element once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import stream
from pallas_kernels.stream import LANES, load

TOKENS = 8
"""Of a tile; T is a multiple of them."""
SLOTS = 4
WIDEST = 4
"""Rows of 128 channels in a strip, at most."""
FORWARD_PART, BACKWARD_PART = 64, 128
"""Tokens of a block; the backward's are more since each block leaves sums of its own."""


@jax.jit
def forward(x, kernel, bias, reach=None):
    """Return y (B, T, I) bf16 of x (B, T, 2 I) bf16, kernel (W, I) fp32 and bias (2 I) fp32.

    `reach` (B, T) int32 counts the earlier tokens that a token sees, at most W-1; it is -1 for padding, which gets 0.
    T is a multiple of 8, I of 128, W at least 2.
    """
    plan = _Plan.of(x, kernel, FORWARD_PART)
    packed = plan.windows(reach)

    def body(x_ref, kernel_ref, bias_ref, *refs):
        reach_refs, (y_ref, tiles, filled, *reach_scratch) = refs[: len(packed)], refs[len(packed) :]
        at = plan.here()

        def fetch(n, slot):
            for half, channels in enumerate((at.strip, at.gates)):
                source = x_ref.at[at.row, at.tokens(n), channels]
                plgpu.copy_gmem_to_smem(source, tiles.at[half, slot], filled.at[slot])

        ring = stream.Ring(at.tiles, SLOTS, filled, fetch)
        taps, bias_u, bias_gate = _weights(kernel_ref, bias_ref, at)
        reaches = plan.reaches(at, reach_refs, reach_scratch)

        def step(n, slot, past):
            for i in range(TOKENS):
                window = (*past, load(tiles.at[0, slot, i]) + bias_u)
                seen = reaches(n * TOKENS + i)
                c = _convolve(_visible(window, seen), taps)
                y = c * _sigmoid(c) * (load(tiles.at[1, slot, i]) + bias_gate)
                tiles.at[1, slot, i][...] = _unless_padding(y, seen, packed).astype(x.dtype)
                past = window[1:]
            return past

        def put(n, slot):
            target = y_ref.at[at.row, at.tokens(n), at.strip]
            plgpu.copy_smem_to_gmem(tiles.at[1, slot], target, commit_group=False)

        past = tuple(_row(x_ref, at.row, at.first - j, at.strip) + bias_u for j in range(plan.taps - 1, 0, -1))
        ring.walk(step, put, past)

    out_type = [jax.ShapeDtypeStruct((*x.shape[:2], plan.width, LANES), x.dtype)]
    kernel_of = stream.kernel(body, "gated_conv", plan.blocks, out_type, plan.scratch(2, packed))
    [y] = kernel_of(*(_by_lanes(z) for z in (x, kernel, bias)), *packed)
    return [y.reshape(*x.shape[:2], -1)]


@jax.jit
def backward(x, kernel, bias, dy, reach=None):
    """Return dx (B, T, 2 I) bf16 and sums (parts, W+2, I) fp32: of dkernel, and of the two halves of dbias.

    Arguments as of `forward`, and the gradient dy (B, T, I) of its result. Tokens are walked from the last to the
    first: what a token's convolution gives to the tokens before it waits in registers.
    """
    plan = _Plan.of(x, kernel, BACKWARD_PART)
    packed = plan.windows(reach)

    def body(x_ref, kernel_ref, bias_ref, dy_ref, *refs):
        reach_refs, refs = refs[: len(packed)], refs[len(packed) :]
        dx_ref, sums_ref, tiles, filled, *reach_scratch = refs
        at = plan.here()
        sources = (x_ref, at.strip), (x_ref, at.gates), (dy_ref, at.strip)

        def tokens(n):
            return at.tokens(at.tiles - 1 - n)

        def fetch(n, slot):
            for kind, (ref, channels) in enumerate(sources):
                plgpu.copy_gmem_to_smem(ref.at[at.row, tokens(n), channels], tiles.at[kind, slot], filled.at[slot])

        ring = stream.Ring(at.tiles, SLOTS, filled, fetch)
        taps, bias_u, bias_gate = _weights(kernel_ref, bias_ref, at)
        reaches = plan.reaches(at, reach_refs, reach_scratch)

        def token(window, gate, dy, seen, pending):
            """Return a token's visible inputs, the gradients of conv(u), u and gate, and what is given to those before.

            `pending` is what the tokens after it have given to it and to each of those before it.
            """
            window = _visible(window, seen)
            c = _convolve(window, taps)
            s = _sigmoid(c)
            dc = dy * gate * s * (1.0 + c - c * s)
            given = [_where(seen >= j, dc, 0.0) * taps[-1 - j] for j in range(1, plan.taps)]
            later = [p + g for p, g in zip(pending[1:], given[:-1], strict=True)] + given[-1:]
            return window, dc, pending[0] + dc * taps[-1], dy * c * s, later

        def step(n, slot, carry):
            pending, dtaps, du_sum, dgate_sum = carry
            inside, next_slot = n + 1 < at.tiles, lax.rem(n + 1, SLOTS)
            rows = [
                _where(inside, load(tiles.at[0, next_slot, TOKENS - j]) + bias_u, before)
                for j, before in zip(range(plan.taps - 1, 0, -1), past, strict=True)
            ]
            rows += [load(tiles.at[0, slot, i]) + bias_u for i in range(TOKENS)]
            for i in reversed(range(TOKENS)):
                seen = reaches((at.tiles - 1 - n) * TOKENS + i)
                gate, dy = load(tiles.at[1, slot, i]) + bias_gate, load(tiles.at[2, slot, i])
                dy = _unless_padding(dy, seen, packed)
                window, dc, du, dgate, pending = token(rows[i : i + plan.taps], gate, dy, seen, pending)
                tiles.at[1, slot, i][...] = dgate.astype(x.dtype)
                tiles.at[2, slot, i][...] = du.astype(x.dtype)
                dtaps = [total + dc * u for total, u in zip(dtaps, window, strict=True)]
                du_sum, dgate_sum = du_sum + du, dgate_sum + dgate
            return pending, dtaps, du_sum, dgate_sum

        def put(n, slot):
            for kind, channels in ((2, at.strip), (1, at.gates)):
                target = dx_ref.at[at.row, tokens(n), channels]
                plgpu.copy_smem_to_gmem(tiles.at[kind, slot], target, commit_group=False)

        def row(t):
            return _row(x_ref, at.row, t, at.strip) + bias_u

        def beyond(pending):
            """Return what the tokens after the part give to it."""
            for i in reversed(range(plan.taps - 1)):
                t, seen = at.first + plan.part + i, reaches(plan.part + i)
                gate, dy = _row(x_ref, at.row, t, at.gates) + bias_gate, _row(dy_ref, at.row, t, at.strip)
                dy = _unless_padding(_where(t < plan.time, dy, 0.0), seen, packed)
                window = [row(t - j) for j in range(plan.taps - 1, -1, -1)]
                *_, pending = token(window, gate, dy, seen, pending)
            return pending

        past = [row(at.first - j) for j in range(plan.taps - 1, 0, -1)]
        zero = jnp.zeros_like(bias_u)
        carry = beyond([zero] * (plan.taps - 1)), [zero] * plan.taps, zero, zero
        _, dtaps, *dbias = ring.walk(step, put, carry, ahead=1)
        for w, total in enumerate([*dtaps, *dbias]):
            sums_ref.at[at.piece, w, at.strip][...] = total

    out_type = [
        jax.ShapeDtypeStruct((*x.shape[:2], 2 * plan.width, LANES), x.dtype),
        jax.ShapeDtypeStruct((plan.batch * plan.parts, plan.taps + 2, plan.width, LANES), jnp.float32),
    ]
    kernel_of = stream.kernel(body, "gated_conv_backward", plan.blocks, out_type, plan.scratch(3, packed))
    dx, sums = kernel_of(*(_by_lanes(z) for z in (x, kernel, bias, dy)), *packed)
    return [dx.reshape(x.shape), sums.reshape(*sums.shape[:2], -1)]


class _Place(NamedTuple):
    """A block's row of the batch, part of all parts, first token, number of tiles, and rows of 128 channels."""

    row: jax.Array
    piece: jax.Array
    first: jax.Array
    tiles: jax.Array
    strip: pl.Slice
    gates: pl.Slice

    def tokens(self, tile) -> pl.Slice:
        return pl.ds(self.first + tile * TOKENS, TOKENS)


class _Plan(NamedTuple):
    """How the work is cut: B, T, I / 128, W and the tokens of a part."""

    batch: int
    time: int
    width: int
    taps: int
    part: int

    @classmethod
    def of(cls, x, kernel, part: int) -> "_Plan":
        batch, time, channels = x.shape
        return cls(batch, time, channels // (2 * LANES), kernel.shape[0], part)

    @property
    def rows(self) -> int:
        return stream.rows_per_lane(self.width * LANES, WIDEST)

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
        tiles = lax.div(jnp.minimum(self.part, self.time - first), TOKENS)
        return _Place(row, piece, first, tiles, pl.ds(strip, self.rows), pl.ds(self.width + strip, self.rows))

    def windows(self, reach) -> list:
        """Return, where there are documents, their reaches up to a tile past the last part."""
        if reach is None:
            return []
        return [jnp.pad(reach, ((0, 0), (0, self.parts * self.part + TOKENS - self.time)), constant_values=-1)]

    def reaches(self, at: _Place, reach_refs, scratch):
        """Return the function from a token of the part, or one after it, to how many before it it sees."""
        if not scratch:
            return lambda i: jnp.minimum(at.first + i, self.taps - 1)
        [reach_ref], (tile, filled) = reach_refs, scratch
        plgpu.copy_gmem_to_smem(reach_ref.at[at.row, pl.ds(at.first, self.part + TOKENS)], tile, filled)
        plgpu.barrier_wait(filled)
        return lambda i: tile[i]

    def scratch(self, kinds: int, packed: list) -> list:
        """Return a ring of tiles of each kind of array, its barriers, and the reaches with theirs."""
        reach = [plgpu.SMEM((self.part + TOKENS,), jnp.int32), plgpu.Barrier()] if packed else []
        ring = plgpu.SMEM((kinds, SLOTS, TOKENS, self.rows, LANES), jnp.bfloat16)
        return [ring, plgpu.Barrier(num_arrivals=kinds, num_barriers=SLOTS), *reach]


def _by_lanes(x):
    return x.reshape(*x.shape[:-1], -1, LANES)


def _weights(kernel_ref, bias_ref, at: _Place):
    """Return the taps and the biases of u and of the gate."""
    taps = [load(kernel_ref.at[w, at.strip]) for w in range(kernel_ref.shape[0])]
    return taps, load(bias_ref.at[at.strip]), load(bias_ref.at[at.gates])


def _row(ref, row, t, channels):
    """Return the nearest token's row to token t."""
    return load(ref.at[row, jnp.clip(t, 0, ref.shape[1] - 1), channels])


def _visible(window, seen):
    """Return a token's inputs, the oldest first, with zeros for those that it does not see."""
    reach = range(len(window) - 1, 0, -1)
    return [*(_where(seen >= j, u, 0.0) for j, u in zip(reach, window[:-1], strict=True)), window[-1]]


def _convolve(window, taps):
    return sum(u * tap for u, tap in zip(window[1:], taps[1:], strict=True)) + window[0] * taps[0]


def _unless_padding(x, seen, packed: list):
    return _where(seen >= 0, x, 0.0) if packed else x


def _where(condition, x, y):
    """Select by a scalar; a product with 0 or 1 would let infinities of other documents through."""
    return lax.select(jnp.broadcast_to(condition, x.shape), x, jnp.broadcast_to(y, x.shape))


def _sigmoid(x):
    """Return 1 / (1 + exp(-x)) with two approximate instructions; a division takes many."""
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return root * root

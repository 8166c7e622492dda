"""A residual addition and the RMS norm or layer norm of its sum on TPUs: each array is read and written once.

    t = r + y          c = t, or t - mean(t) of a layer norm          n = c / sqrt(mean(c^2) + eps)          x = scale n

and a layer norm's bias on x. Backwards, with n made anew from t:

    g = scale dx          dt' = dt + (g - n mean(g n)) / sqrt(mean(c^2) + eps)          dr = dy = dt'

where a layer norm takes mean(g) from g too, dscale = sum dx n and dbias = sum dx over tokens. Channels lie on lanes and
tokens on sublanes; the arithmetic is fp32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import split

SUBLANES = 8
PART_TOKENS = 16
"""Tokens whose registers are computed at once: a tile of bf16."""
BLOCK_TOKENS = 16, 32, 64, 128, 256, 512
MAX_BLOCK_BYTES = 16 << 20
"""Of the blocks of a program."""
TOKEN_CHANNEL_BYTES = 2 * 20
"""Of a token and channel in the backward pass, all in fp32, each block twice: while the one before is computed."""
VMEM_BYTES = 48 << 20


def block_tokens(time: int, channels: int) -> int:
    """Return the tokens of a program: no more than there are, or fit."""
    most = min(MAX_BLOCK_BYTES // (TOKEN_CHANNEL_BYTES * channels), pl.cdiv(time, PART_TOKENS) * PART_TOKENS)
    return max((tokens for tokens in BLOCK_TOKENS if tokens <= most), default=BLOCK_TOKENS[0])


@functools.partial(jax.jit, static_argnames=("eps", "dtype"))
def forward(r, y, scale, bias, *, eps: float, dtype: jnp.dtype):
    """Return t (B, T, D) fp32, unless y is None, and x (B, T, D) in a dtype.

    Args:
      r: (B, T, D) fp32.
      y: (B, T, D) bf16 or fp32, or None.
      scale: (1, D) fp32.
      bias: (1, D) fp32, None for RMS norm.
      eps: beside the mean square.
      dtype: bf16 or fp32.
    """
    adds, centered = y is not None, bias is not None
    walk = Walk.of(r)

    def body(*refs):
        sources, weights, [*total_ref, x_ref] = split(refs, 1 + adds, 1 + centered)

        def of_part(part, _):
            total = sum(read(ref, part) for ref in sources)
            for ref in total_ref:
                ref[0, part] = total
            n, _ = normal(total, eps, centered)
            scale, *shift = (ref[...] for ref in weights)
            x_ref[0, part] = sum(shift, n * scale).astype(dtype)

        walk.over_parts(of_part, None)

    tokens, whole = [x for x in (r, y) if x is not None], [x for x in (scale, bias) if x is not None]
    results = [jnp.float32] * adds + [dtype]
    return walk.launch(body, tokens, whole, results, 0, "residual_norm_forward")


@functools.partial(jax.jit, static_argnames=("eps", "y_dtype", "centered"))
def gradients(total, scale, dx, dtotal, *, eps: float, y_dtype: jnp.dtype | None, centered: bool):
    """Return dr (B, T, D) fp32, dy in y's dtype unless that is None or fp32, and sums (programs, 1 or 2, D) fp32.

    The sums of all programs are dscale and, of a layer norm, dbias.

    Args:
      total: t (B, T, D) fp32.
      scale: (1, D) fp32.
      dx, dtotal: the gradients of the norm, in its dtype, and of t, fp32.
      eps: of `forward`.
      y_dtype: y's, None where there was none.
      centered: whether it was a layer norm.
    """
    walk, channels = Walk.of(total), total.shape[2]

    def body(total_ref, dx_ref, dtotal_ref, scale_ref, *refs):
        *of_tokens, sums_ref = refs

        def of_part(part, sums):
            dx = read(dx_ref, part)
            n, inverse = normal(read(total_ref, part), eps, centered)
            g = dx * scale_ref[...]
            rest = g - n * mean(g * n)
            rest = rest - mean(g) if centered else rest
            dt = dtotal_ref[0, part] + inverse * rest
            for ref in of_tokens:
                ref[0, part] = dt.astype(ref.dtype)
            seen = [walk.tokens_alone(part, x) for x in (dx * n, dx)[: len(sums)]]
            return [total + x.reshape(-1, SUBLANES, channels).sum(0) for total, x in zip(sums, seen, strict=True)]

        sums = walk.over_parts(of_part, [jnp.zeros((SUBLANES, channels), jnp.float32)] * (1 + centered))
        for row, total in enumerate(sums):
            sums_ref[0, row : row + 1] = jnp.sum(total, axis=0, keepdims=True)

    results = [jnp.float32] + [y_dtype] * (y_dtype not in (None, jnp.float32))
    return walk.launch(body, [total, dx, dtotal], [scale], results, 1 + centered, "residual_norm_gradients")


class Walk(NamedTuple):
    """Arrays (B, T, D) by blocks of tokens, a program each."""

    like: jax.Array
    tokens: int

    @classmethod
    def of(cls, x) -> "Walk":
        """Return that over an array."""
        return cls(x, block_tokens(x.shape[1], x.shape[2]))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and blocks of each."""
        return self.like.shape[0], pl.cdiv(self.like.shape[1], self.tokens)

    def launch(self, body, tokens, whole, dtypes, sums: int, name: str):
        """Run a body over arrays like the walk's and whole parameters; results are of dtypes, and so many sums."""
        rows, blocks = self.grid
        varying = jax.typeof(self.like).manual_axis_type
        block = pl.BlockSpec((1, self.tokens, self.like.shape[2]), lambda row, n: (row, n, 0))
        of_sums = pl.BlockSpec((1, sums, self.like.shape[2]), lambda row, n: (row * blocks + n, 0, 0))
        shapes = [(self.like.shape, dtype) for dtype in dtypes]
        shapes += [((rows * blocks, sums, self.like.shape[2]), jnp.float32)] * (sums > 0)
        results = [jax.ShapeDtypeStruct(*x, manual_axis_type=varying) for x in shapes]
        moved = sum(x.size * x.dtype.itemsize for x in (*tokens, *whole, *results))
        return pl.pallas_call(
            body,
            out_shape=results,
            grid=self.grid,
            in_specs=[block] * len(tokens) + [pl.BlockSpec(x.shape, lambda row, n: (0, 0)) for x in whole],
            out_specs=[block] * len(dtypes) + [of_sums] * (sums > 0),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
            ),
            cost_estimate=pl.CostEstimate(
                flops=0, transcendentals=self.like.size // self.like.shape[2], bytes_accessed=moved
            ),
            name=name,
        )(*tokens, *whole)

    def over_parts(self, of_part, carry):
        """Return what `of_part(part, carry)` has made of a carry for each part of a program's tokens."""

        def turn(n, carry):
            return of_part(pl.ds(pl.multiple_of(n * PART_TOKENS, PART_TOKENS), PART_TOKENS), carry)

        return lax.fori_loop(0, self.tokens // PART_TOKENS, turn, carry)

    def tokens_alone(self, part, x):
        """Return x of a part with zeros behind the last token."""
        if self.like.shape[1] % self.tokens == 0:
            return x
        place = pl.program_id(1) * self.tokens + part.start + lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(place < self.like.shape[1], x, 0.0)


def read(ref, part):
    """Return a part of a block in fp32."""
    return ref[0, part].astype(jnp.float32)


def mean(x):
    """Return that over channels (., 1)."""
    return jnp.sum(x, axis=1, keepdims=True) * (1.0 / x.shape[1])


def normal(total, eps: float, centered: bool):
    """Return n, and what c is multiplied by for it (., 1)."""
    c = total - mean(total) if centered else total
    inverse = lax.rsqrt(mean(c * c) + eps)
    return c * inverse, inverse

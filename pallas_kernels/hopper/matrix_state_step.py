"""A token of a matrix state on Hopper: each state is read once, and written where it lies (`ops/matrix_state_step.py`).

    u = S^T a        S' = diag(w) S + b u^T + k v^T        o = scale S'^T q

The delta rule is a = w k, b = -beta k and beta k for k. A block takes a strip of columns of one head's state into its
registers: the columns do not meet, so that a state is cut into as many strips as fill the GPU. A warp has a share of
the columns and all rows, which lie over its lanes beside each other: sums over rows take a few shuffles. So queries and
keys can be brought to length 1 here too, out of the product in which they and values stand behind each other.
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
from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS, load_global, save

WIDTHS = (128, 64, 32)
"""Columns of a strip, the widest first."""
MAX_STRIP_ELEMENTS = 8192
"""64 of a lane."""
LANE_VECTOR = 4
"""Columns that lie beside each other in a lane."""
UNIT_EPS = 1e-6
"""Below the root of what queries and keys are divided by."""


@functools.partial(jax.jit, static_argnames=("scale", "multiprocessors"))
def step(q, k, v, w, state, *more, scale: float, multiprocessors: int):
    """Return o like v, and the state after the token (B, H, K, V) fp32, in the place of the one given.

    Args:
      q, k: (B, H, K) bf16 or fp32; K is a multiple of 16 up to 256.
      v: (B, H, V) bf16 or fp32; V is a multiple of 32.
      w: (B, H, K) or (B, H, 1) fp32, what is kept of the state.
      state: (B, H, K, V) fp32.
      more: beta (B, H, 1) fp32 for the delta rule, a and b (B, H, K) fp32 for any low rank, or nothing.
      scale: of the output.
      multiprocessors: of the GPU.
    """
    plan, count = _Plan.of(state, multiprocessors), 5 + len(more)

    def body(*refs):
        (q_ref, k_ref, v_ref, w_ref, *more_refs, state_ref), [o_ref] = split(refs, count)
        at = plan.here()
        S = load_global(state_ref.at[at.head, :, at.strip], plan.layout)
        w, k, *ab = plan.transition(at, w_ref, k_ref, more_refs)
        after = w * S + k * plan.down(plan.columns(at, v_ref.at[at.head]))
        if ab:
            a, b = ab
            after += b * plan.down((a * S).sum(axis=0))
        save(state_ref.at[at.head, :, at.strip], after)
        o = (plan.rows(at, q_ref) * after).sum(axis=0)
        save(o_ref.at[at.head, at.strip], scale * o)

    heads, ref = plan.heads, jax.new_ref(state.reshape(plan.heads, *plan.state))
    inputs = [x.reshape(heads, -1) for x in (q, k, v, w, *more)]
    out_type = [jax.ShapeDtypeStruct((heads, plan.state[1]), v.dtype)]
    [o] = stream.kernel(body, "matrix_state_step", plan.blocks, out_type, [])(*inputs, ref)
    return o.reshape(v.shape), ref[...].reshape(state.shape)


@functools.partial(jax.jit, static_argnames=("scale", "multiprocessors"))
def unit_step(joint, w, beta, state, *, scale: float, multiprocessors: int):
    """Return o (B, H, V), and the state after the token, as `step` for the delta rule on q / |q| and k / |k|.

    Args:
      joint: (B, H (2 K + V)) bf16 or fp32: queries of all heads, keys, values.
      w, beta, state, scale, multiprocessors: as of `step`.
    """
    plan, (B, H, K, V) = _Plan.of(state, multiprocessors), state.shape

    def body(joint_ref, w_ref, beta_ref, state_ref, o_ref):
        at = plan.here()
        row, head = lax.div(at.head, H), lax.rem(at.head, H)
        tokens = joint_ref.at[row]
        S = load_global(state_ref.at[at.head, :, at.strip], plan.layout)
        k, of_k = plan.unit_key(tokens.at[pl.ds((H + head) * K, K)])
        v = plan.columns(at, tokens.at[pl.ds(2 * H * K + head * V, V)])
        kept = plan.rows(at, w_ref) * S
        new = plan.rows(at, beta_ref) * of_k * (v - of_k * (k * kept).sum(axis=0))
        after = kept + k * plan.down(new)
        save(state_ref.at[at.head, :, at.strip], after)
        q, of_q = plan.unit_key(tokens.at[pl.ds(head * K, K)])
        save(o_ref.at[at.head, at.strip], scale * of_q * (q * after).sum(axis=0))

    ref = jax.new_ref(state.reshape(plan.heads, *plan.state))
    gates = [x.reshape(plan.heads, -1) for x in (w, beta)]
    out_type = [jax.ShapeDtypeStruct((plan.heads, V), joint.dtype)]
    [o] = stream.kernel(body, "unit_delta_step", plan.blocks, out_type, [])(joint, *gates, ref)
    return o.reshape(B, H, V), ref[...].reshape(state.shape)


class _Place(NamedTuple):
    """A block's head, of those of all rows, and its columns."""

    head: jax.Array
    strip: pl.Slice


class _Plan(NamedTuple):
    """How the work is cut: the heads of all rows, K and V of a state, and the columns of a strip."""

    heads: int
    state: tuple[int, int]
    width: int

    @classmethod
    def of(cls, state, multiprocessors: int) -> "_Plan":
        """Return the plan with the widest strips that are few enough for registers and many enough for the GPU."""
        batch, heads, keys, values = state.shape
        fitting = [x for x in WIDTHS if values % x == 0 and keys * x <= MAX_STRIP_ELEMENTS and keys % cls.lanes(x) == 0]
        enough = [x for x in fitting if batch * heads * values // x >= multiprocessors]
        return cls(batch * heads, (keys, values), (enough or fitting[-1:])[0])

    @staticmethod
    def lanes(width: int) -> int:
        """Return over how many lanes of a warp rows lie, the columns over the others."""
        return WARP_LANES * WARPS * LANE_VECTOR // width

    @property
    def blocks(self) -> int:
        return self.heads * self.strips

    @property
    def strips(self) -> int:
        return self.state[1] // self.width

    @property
    def shape(self) -> tuple[int, int]:
        """Of a strip."""
        return self.state[0], self.width

    @property
    def layout(self):
        """The layout of a strip."""
        rows, of_warp = self.lanes(self.width), self.width // WARPS
        tiling = plgpu.Tiling(((rows, self.width), (rows, of_warp), (LANE_VECTOR,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)

    def here(self) -> _Place:
        block = lax.axis_index("block")
        return _Place(lax.div(block, self.strips), pl.ds(lax.rem(block, self.strips) * self.width, self.width))

    def rows(self, at: _Place, ref) -> jax.Array:
        """Return one value per row, or one for all, repeated over the columns."""
        if ref.shape[1] == 1:
            return ref[at.head, 0]
        return self.key(ref.at[at.head])

    def key(self, ref) -> jax.Array:
        """Return K values, one per row, repeated over the columns."""
        return lax.broadcast_in_dim(self._load(ref, self.layout.reduce(1)), self.shape, [0])

    def unit_key(self, ref) -> tuple[jax.Array, jax.Array]:
        """Return the same, and for each column what brings them to length 1."""
        x = self.key(ref)
        return x, lax.rsqrt((x * x).sum(axis=0) + UNIT_EPS)

    def columns(self, at: _Place, ref) -> jax.Array:
        """Return the values of a strip, of V."""
        return self._load(ref.at[at.strip], self.layout.reduce(0))

    def down(self, columns) -> jax.Array:
        """Repeat one value per column over the rows."""
        return lax.broadcast_in_dim(columns, self.shape, [1])

    def transition(self, at: _Place, w_ref, k_ref, more_refs) -> list[jax.Array]:
        """Return w, the key that is written and, where the state is corrected, a and b."""
        w, k = self.rows(at, w_ref), self.rows(at, k_ref)
        if len(more_refs) == 1:
            rate = self.rows(at, more_refs[0])
            return [w, rate * k, w * k, -rate * k]
        return [w, k, *(self.rows(at, ref) for ref in more_refs)]

    @staticmethod
    def _load(ref, layout) -> jax.Array:
        return load_global(ref, layout).astype(jnp.float32)

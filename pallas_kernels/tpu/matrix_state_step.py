"""A token of a matrix state on TPUs: each state is read once, and written where it lies (`ops/matrix_state_step.py`).

    u = S^T a        S' = diag(w) S + b u^T + k v^T        o = scale S'^T q

The delta rule is a = w k, b = -beta k and beta k for k. A program takes several heads of one row, whose states (K, V)
lie with K on sublanes and V on lanes. What each of their rows counts comes with K on lanes, and is turned over for all
heads at once; sums over K are sums over sublanes, exact in fp32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import split

SUBLANES, LANES = 8, 128
MAX_BLOCK_BYTES = 3 << 20
"""Of a program's states, of which VMEM holds two blocks that come and two that go."""


@functools.partial(jax.jit, static_argnames=("scale",))
def step(q, k, v, w, state, *more, scale: float):
    """Return o like v, and the state after the token (B, H, K, V) fp32, in the place of the one given.

    Args:
      q, k: (B, H, K) bf16 or fp32.
      v: (B, H, V) bf16 or fp32.
      w: (B, H, K) or (B, H, 1) fp32, what is kept of the state.
      state: (B, H, K, V) fp32.
      more: beta (B, H, 1) fp32 for the delta rule, a and b (B, H, K) fp32 for any low rank, or nothing.
      scale: of the output.
    """
    given, heads = (q, k, v, w, *more), heads_of_program(state.shape)
    assert heads is not None, "the caller asks before"
    varying = jax.typeof(state).manual_axis_type

    def body(*refs):
        tokens, [state_ref, o_ref, after_ref] = split(refs, len(given))
        q, k, v, w, *more = (ref[0].astype(jnp.float32) for ref in tokens)
        columns, outputs = Columns.of(q, k, w, more), []
        for head in range(heads):
            S, at = state_ref[0, head], columns.at(head)
            after = at.w * S + at.k * v[head : head + 1]
            if at.a is not None and at.b is not None:
                after = after + at.b * jnp.sum(at.a * S, axis=0, keepdims=True)
            after_ref[0, head] = after
            outputs.append(scale * jnp.sum(at.q * after, axis=0, keepdims=True))
        o_ref[0] = jnp.concatenate(outputs, axis=0).astype(o_ref.dtype)

    def block(x):
        rest = x.shape[2:]
        return pl.BlockSpec((1, heads, *rest), lambda row, group: (row, group, *[0] * len(rest)))

    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in (v, state)],
        grid=(state.shape[0], state.shape[1] // heads),
        in_specs=[block(x) for x in (*given, state)],
        out_specs=[block(v), block(state)],
        input_output_aliases={len(given): 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="matrix_state_step",
    )(*given, state)


def heads_of_program(shape: tuple[int, ...]) -> int | None:
    """Return how many heads of states (B, H, K, V) a program takes, all or 8 and more; None where VMEM is too small."""
    _, heads, keys, values = shape
    of_head = 4 * -(-keys // SUBLANES) * SUBLANES * -(-values // LANES) * LANES
    fitting = [n for n in range(heads, 0, -1) if heads % n == 0 and n * of_head <= MAX_BLOCK_BYTES]
    return next((n for n in fitting if n == heads or n % SUBLANES == 0), None)


class Columns(NamedTuple):
    """What each row of a state counts (K, H or 1), or of w one for all (1, H); a and b of a state that is corrected."""

    q: jax.Array
    k: jax.Array
    w: jax.Array
    a: jax.Array | None = None
    b: jax.Array | None = None

    @classmethod
    def of(cls, q, k, w, more) -> "Columns":
        """Return them for all heads, of arrays (H, K)."""
        if len(more) == 1:
            [rate] = more
            more = [w * k, -rate * k]
            k = rate * k
        return cls(*(x.T for x in (q, k, w, *more)))

    def at(self, head: int) -> "Columns":
        """Return those of a head."""
        return jax.tree.map(lambda x: x[:, head : head + 1], self)

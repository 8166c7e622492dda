"""The calls that are compiled: a token of each state, and a window's attention over a sequence."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from based_jax.bench.static.schedules import Schedule
from based_jax.ops import delta_rule, softmax, taylor_decode


class Call(NamedTuple):
    """What is compiled.

    Attributes:
      function: of the implementation and the arguments.
      arguments: a function that makes them.
      donated: which of them may be written in place: the state.
      moved_bytes: what has to be read or written of the state, or of all arguments and the result, once.
      tokens, heads: over which bundles are divided.
      state: its shape, or that of q.
      kernel: the name of the kernel.
      cycles: of all its programs, by their schedule.
    """

    function: Callable
    arguments: Callable[[], tuple]
    donated: tuple[int, ...]
    moved_bytes: float
    tokens: int
    heads: int
    state: tuple[int, ...]
    kernel: str
    cycles: Callable[[Schedule], int]


def taylor(dtype: str, rows: int = 128, heads: int = 16, keys: int = 16, values: int = 112, room: int = 16) -> Call:
    """Return a token of Taylor attention that adds nothing to the state."""
    from pallas_kernels.tpu import taylor_decode as kernels

    plan = kernels.Plan(rows, heads, 1, keys, values, room, jnp.dtype(dtype), jnp.dtype(jnp.bfloat16))
    features, turn = plan.features, kernels.largest_divisor(plan.chunk, kernels.MAX_UNROLLED)

    def arguments():
        q, v = (jnp.zeros((rows, 1, heads, dim), jnp.bfloat16) for dim in (keys, values))
        form = {"flush": room, "state_dtype": dtype, "dtype": jnp.dtype(jnp.bfloat16)}
        return q, q, v, taylor_decode.initial_state(rows, heads, keys, values, **form)

    def cycles(schedule: Schedule) -> int:
        """Count the loops over features and over all recent tokens as often as they run, and no others."""
        of_features = max(loop.own for loop in schedule.loops if not loop.inner)
        of_tokens = schedule.loops[-2].own * room // kernels.MAX_UNROLLED_TOKENS
        of_head = features // turn * of_features + of_tokens + features // plan.chunk * schedule.straight
        return rows // plan.lanes * heads * of_head

    moved = rows * heads * features * values * jnp.dtype(dtype).itemsize
    state = rows, heads, features, values
    function = taylor_decode.taylor_attention_decode
    return Call(function, arguments, (3,), moved, rows, heads, state, "taylor_decode", cycles)


def delta(rows: int = 128, heads: int = 16, keys: int = 128, values: int = 128) -> Call:
    """Return a token of the gated delta rule."""
    from pallas_kernels.tpu import matrix_state_step as kernels

    shape = rows, heads, keys, values

    def arguments():
        q, v = (jnp.zeros((rows, heads, dim), jnp.bfloat16) for dim in (keys, values))
        return q, q, v, jnp.zeros((rows, heads, 1)), jnp.zeros((rows, heads)), jnp.zeros(shape)

    def cycles(schedule: Schedule) -> int:
        assert not schedule.loops
        return rows * heads // (kernels.heads_of_program(shape) or heads) * schedule.straight

    moved = 8.0 * math.prod(shape)
    return Call(delta_rule.delta_rule_step, arguments, (5,), moved, rows, heads, shape, "matrix_state_step", cycles)


def window(rows: int = 2, time: int = 2048, heads: int = 16, dim: int = 64, window: int = 64) -> Call:
    """Return attention over a window of a sequence, in JAX's splash attention."""
    from based_jax.ops.tpu.attention import BLOCK_TOKENS

    shape = rows, time, heads, dim

    def arguments():
        return (jnp.zeros(shape, jnp.bfloat16),) * 3

    def cycles(schedule: Schedule) -> int:
        """Count a program for each block of queries and each of the two of keys that it may see."""
        assert not schedule.loops and window <= BLOCK_TOKENS
        return rows * heads * time // BLOCK_TOKENS * 2 * schedule.straight

    function = functools.partial(softmax.window_attention, window=window)
    moved = 4 * 2.0 * math.prod(shape)
    return Call(function, arguments, (), moved, rows * time, heads, shape, "splash_mha_fwd_no_residuals", cycles)


CALLS: dict[str, Callable[[], Call]] = {
    **{f"Taylor, {dtype}": functools.partial(taylor, dtype) for dtype in taylor_decode.FORMATS},
    "gated delta rule": delta,
    "window of 64": window,
}

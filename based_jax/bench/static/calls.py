"""The calls that are compiled: a token of each state, and a window's attention over a sequence."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from based_jax.ops import delta_rule, softmax, taylor_decode
from based_jax.ops.taylor import expanded_dim
from based_jax.ops.tpu import bundles


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
    cycles: Callable[[bundles.Schedule], int]


def taylor(dtype: str, rows: int = 128, heads: int = 16, keys: int = 16, values: int = 112, room: int = 16) -> Call:
    """Return a token of Taylor attention that adds nothing to the state."""
    sizes: dict[str, Any] = {"rows": rows, "heads": heads, "keys": keys, "values": values, "room": room}
    state = rows, heads, expanded_dim(keys), values

    def arguments():
        q, v = (jnp.zeros((rows, 1, heads, dim), jnp.bfloat16) for dim in (keys, values))
        form = {"flush": room, "state_dtype": dtype, "dtype": jnp.dtype(jnp.bfloat16)}
        return q, q, v, taylor_decode.initial_state(rows, heads, keys, values, **form)

    cycles = functools.partial(bundles.of_taylor_decode, state_dtype=dtype, **sizes)
    moved = math.prod(state) * jnp.dtype(dtype).itemsize
    function = taylor_decode.taylor_attention_decode
    return Call(function, arguments, (3,), moved, rows, heads, state, "taylor_decode", cycles)


def delta(rows: int = 128, heads: int = 16, keys: int = 128, values: int = 128) -> Call:
    """Return a token of the gated delta rule."""
    state = rows, heads, keys, values

    def arguments():
        q, v = (jnp.zeros((rows, heads, dim), jnp.bfloat16) for dim in (keys, values))
        return q, q, v, jnp.zeros((rows, heads, 1)), jnp.zeros((rows, heads)), jnp.zeros(state)

    cycles = functools.partial(bundles.of_matrix_state_step, state=state)
    moved = 8.0 * math.prod(state)
    return Call(delta_rule.delta_rule_step, arguments, (5,), moved, rows, heads, state, "matrix_state_step", cycles)


def window(rows: int = 2, time: int = 2048, heads: int = 16, dim: int = 64, window: int = 64) -> Call:
    """Return attention over a window of a sequence, in JAX's splash attention."""
    shape = rows, time, heads, dim

    def arguments():
        return (jnp.zeros(shape, jnp.bfloat16),) * 3

    cycles = functools.partial(bundles.of_window_attention, rows=rows, time=time, heads=heads, window=window)
    function = functools.partial(softmax.window_attention, window=window)
    moved = 4 * 2.0 * math.prod(shape)
    return Call(function, arguments, (), moved, rows * time, heads, shape, "splash_mha_fwd_no_residuals", cycles)


CALLS: dict[str, Callable[[], Call]] = {
    **{f"Taylor, {dtype}": functools.partial(taylor, dtype) for dtype in taylor_decode.FORMATS},
    "gated delta rule": delta,
    "window of 64": window,
}

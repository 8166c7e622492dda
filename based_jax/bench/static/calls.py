"""The calls that are compiled: a token of each state, and matrix states over a sequence."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from based_jax.ops import delta_rule, gated_linear_attention, taylor_decode
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
      cycles: by the names of its kernels, of all programs of each by their schedule.
      flops: that its products need, where they may take longer than its bytes.
    """

    function: Callable
    arguments: Callable[[], tuple]
    donated: tuple[int, ...]
    moved_bytes: float
    tokens: int
    heads: int
    state: tuple[int, ...]
    cycles: Mapping[str, Callable[[bundles.Schedule], int]]
    flops: float = 0.0


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
    return Call(function, arguments, (3,), moved, rows, heads, state, {"taylor_decode": cycles})


def delta(rows: int = 128, heads: int = 16, keys: int = 128, values: int = 128) -> Call:
    """Return a token of the gated delta rule."""
    state = rows, heads, keys, values

    def arguments():
        q, v = (jnp.zeros((rows, heads, dim), jnp.bfloat16) for dim in (keys, values))
        return q, q, v, jnp.zeros((rows, heads, 1)), jnp.zeros((rows, heads)), jnp.zeros(state)

    cycles = functools.partial(bundles.of_matrix_state_step, state=state)
    moved = 8.0 * math.prod(state)
    return Call(delta_rule.delta_rule_step, arguments, (5,), moved, rows, heads, state, {"matrix_state_step": cycles})


def matrix_states(
    kind: str,
    by_channel: bool,
    gradients: bool,
    rows: int = 2,
    time: int = 2048,
    heads: int = 16,
    keys: int = 128,
    values: int = 128,
) -> Call:
    """Return a sequence of a kind of `MATRIX_STATES`."""
    sizes: dict[str, Any] = {"rows": rows, "heads": heads, "time": time, "keys": keys, "values": values}
    q, v, gate = (rows, time, heads, keys), (rows, time, heads, values), (rows, time, heads)
    operation, of_keys, of_heads = MATRIX_STATES[kind]

    def arguments():
        qkv = [jnp.zeros(x, jnp.bfloat16) for x in (q, q, v)]
        decay = jnp.zeros((*gate, keys if by_channel else 1))
        return *qkv, decay, *[jnp.zeros(q, jnp.bfloat16)] * of_keys, *[jnp.zeros(gate)] * of_heads

    def with_gradients(*arguments, impl: str):
        (o, _), pullback = jax.vjp(lambda *x: operation(*x, impl=impl), *arguments)
        return o, pullback((o, jnp.zeros((rows, heads, keys, values))))

    cycles = functools.partial(bundles.of_matrix_states, by_channel=by_channel, **sizes)
    kernels = {"matrix_states_forward": cycles} | ({"matrix_states_reverse": cycles} if gradients else {})
    moved = float(sum(x.size * x.dtype.itemsize for x in (*jax.eval_shape(arguments), *jax.eval_shape(arguments)[2:3])))
    function = with_gradients if gradients else operation
    return Call(function, arguments, (), (1 + 2 * gradients) * moved, rows * time, heads, q, kernels)


MATRIX_STATES: dict[str, tuple[Callable, int, int]] = {
    "linear attention": (gated_linear_attention.gated_linear_attention, 0, 0),
    "delta rule": (delta_rule.delta_rule, 0, 1),
    "low rank": (delta_rule.dplr, 2, 0),
}
"""Operations, and what they take besides decays: arrays like keys, and numbers a head."""
SEQUENCES = {
    f"{kind} by chunks{what}" + ", gradients" * gradients: functools.partial(
        matrix_states, kind, by_channel, gradients, **sizes
    )
    for kind, by_channel, what, sizes in (
        ("linear attention", False, ", a decay a head", {}),
        ("delta rule", False, ", a decay a head", {}),
        ("delta rule", False, " of K 256 and V 512", {"heads": 4, "keys": 256, "values": 512}),
        ("linear attention", True, ", a decay a channel", {}),
        ("delta rule", True, ", a decay a channel", {}),
        ("low rank", True, " of heads of 64", {"keys": 64, "values": 64}),
    )
    for gradients in (False, True)
}

CALLS: dict[str, Callable[[], Call]] = {
    **{f"Taylor, {dtype}": functools.partial(taylor, dtype) for dtype in taylor_decode.FORMATS},
    "gated delta rule": delta,
    **SEQUENCES,
}

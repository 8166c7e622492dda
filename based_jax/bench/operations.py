"""The operations that are measured: their arrays at a shape, their implementations, and the least that each must do.

A shape is (B, H, T). Costs are the least bytes and the products (FLOPs) of one token and head, 64 channels of it where
there are no heads: every input read once, every result written once, what the backward pass needs read again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from based_jax.ops import conv, delta_rule, gated_conv, gated_linear_attention, norm, softmax, taylor
from based_jax.ops.dispatch import Implementation, named

FEATURE_DIM = 16
HEAD_DIM = 64
WINDOWS = 64, 128
CHUNK = 64
"""Tokens of a chunk, for the count of products only."""
PASSES = "forward", "forward+backward"
BF16, FP32 = 2, 4
"""Bytes."""

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What is measured.

    Attributes:
      table: the operation's own implementations.
      arrays: function of a shape that returns what the operation takes.
      run: function of an implementation's name that returns a function of these arrays.
      cost: function of a pass that returns the least (bytes, FLOPs) of one token and head.
      fallback: the plain form is measured along with the accelerated ones.
    """

    table: Mapping[str, Implementation]
    arrays: Callable[[Shape], Sequence[ShapeDtypeStruct]]
    run: Callable[[str], Callable]
    cost: Callable[[str], tuple[float, float]]
    fallback: bool = True

    @property
    def usual(self) -> list[str]:
        """Return the implementations that are measured where none is named."""
        accelerated = [name for name, entry in self.table.items() if entry.platform == "cuda"]
        return accelerated + [named(self.table, "xla")] * self.fallback

    @property
    def named(self) -> list[str]:
        """Return all that can be named, the usual ones first."""
        return list(dict.fromkeys([*self.usual, *self.table]))


def _by_head(*dims: int) -> Callable[[Shape], Sequence[ShapeDtypeStruct]]:
    def arrays(shape: Shape) -> Sequence[ShapeDtypeStruct]:
        batch, heads, time = shape
        return [ShapeDtypeStruct((batch, time, heads, dim), jnp.bfloat16) for dim in dims]

    return arrays


def _taylor_cost(which: str) -> tuple[float, float]:
    """Count q, k, v, o in bf16 and z in fp32; the state is read and added to once per pass over the sequence."""
    k, v, e, visible = FEATURE_DIM, HEAD_DIM, taylor.expanded_dim(FEATURE_DIM), (CHUNK + 1) / 2
    forward = BF16 * (2 * k + 2 * v) + FP32, 4 * e * v + 2 * visible * (k + v)
    if which == "forward":
        return forward
    read, written = BF16 * (2 * k + 3 * v) + FP32, BF16 * (2 * k + v)
    return forward[0] + read + written, forward[1] + 10 * e * v + 2 * visible * (4 * k + 3 * v)


def _attention_cost(which: str) -> tuple[float, float]:
    """Count q, k, v, o in bf16, the logarithms of the sums in fp32, and no products: they depend on the length."""
    forward = 4 * BF16 * HEAD_DIM + FP32
    return (forward if which == "forward" else forward + 8 * BF16 * HEAD_DIM + FP32), 0.0


def _window_cost(which: str, window: int) -> tuple[float, float]:
    """Count q, k, v, o in bf16; the backward pass computes o and its sums again from what it must read anyway."""
    size, flops = 4 * BF16 * HEAD_DIM, 4.0 * HEAD_DIM * window
    return (size, flops) if which == "forward" else (size + 7 * BF16 * HEAD_DIM, 3.5 * flops)


def _window(window: int) -> Operation:
    def run(impl: str) -> Callable:
        return functools.partial(softmax.window_attention, window=window, impl=impl)

    cost = functools.partial(_window_cost, window=window)
    return Operation(softmax.WINDOW_ATTENTION, _by_head(*(HEAD_DIM,) * 3), run, cost)


def _conv_arrays(shape: Shape, taps: int, halves: int) -> Sequence[ShapeDtypeStruct]:
    batch, heads, time = shape
    channels = heads * HEAD_DIM
    weights = (ShapeDtypeStruct(x, jnp.float32) for x in ((taps, channels), (halves * channels,)))
    return [ShapeDtypeStruct((batch, time, halves * channels), jnp.bfloat16), *weights]


def _conv(table: Mapping[str, Implementation], function: Callable, taps: int, halves: int) -> Operation:
    """Return the convolution whose x is so many times as wide as y, in bf16."""

    def run(impl: str) -> Callable:
        return lambda x, kernel, bias: function(x, kernel, bias=bias, impl=impl)

    def cost(which: str) -> tuple[float, float]:
        """Count x and y forward; backward x, dy and dx."""
        forward = halves + 1
        return BF16 * HEAD_DIM * (forward if which == "forward" else forward + 2 * halves + 1), 0.0

    return Operation(table, functools.partial(_conv_arrays, taps=taps, halves=halves), run, cost)


def _norm_arrays(shape: Shape, weights: int = 1) -> Sequence[ShapeDtypeStruct]:
    batch, heads, time = shape
    wide = batch, time, heads * HEAD_DIM
    shapes = (wide, jnp.float32), (wide, jnp.bfloat16), *((wide[2:], jnp.float32),) * weights
    return [ShapeDtypeStruct(*x) for x in shapes]


def _norm_cost(which: str) -> tuple[float, float]:
    """Count r and its gradients in fp32, y and the norm and theirs in bf16; the backward pass reads the sum again."""
    forward = HEAD_DIM * (2 * FP32 + 2 * BF16)
    return (forward if which == "forward" else forward + HEAD_DIM * (3 * FP32 + 2 * BF16)), 0.0


def _gated_arrays(shape: Shape) -> Sequence[ShapeDtypeStruct]:
    batch, heads, time = shape
    return [*_by_head(*(HEAD_DIM,) * 3)(shape), ShapeDtypeStruct((batch, time, heads, HEAD_DIM), jnp.float32)]


def _delta_arrays(shape: Shape) -> Sequence[ShapeDtypeStruct]:
    batch, heads, time = shape
    return [*_gated_arrays(shape), ShapeDtypeStruct((batch, time, heads), jnp.float32)]


def _gated(impl: str) -> Callable:
    def call(q, k, v, g):
        return gated_linear_attention.gated_linear_attention(q, k, v, -jax.nn.softplus(g), impl=impl)

    return call


def _simple_arrays(shape: Shape) -> Sequence[ShapeDtypeStruct]:
    batch, heads, time = shape
    return [*_by_head(*(HEAD_DIM,) * 3)(shape), ShapeDtypeStruct((batch, time, heads, 1), jnp.float32)]


def _gated_delta_arrays(shape: Shape) -> Sequence[ShapeDtypeStruct]:
    batch, heads, time = shape
    return [*_simple_arrays(shape), ShapeDtypeStruct((batch, time, heads), jnp.float32)]


def _delta(impl: str) -> Callable:
    def call(q, k, v, g, beta):
        k = k * jax.lax.rsqrt(jnp.sum(k.astype(jnp.float32) ** 2, axis=-1, keepdims=True)).astype(k.dtype)
        return delta_rule.delta_rule(q, k, v, -jax.nn.softplus(g), jax.nn.sigmoid(beta), impl=impl)

    return call


def _recurrence_cost(which: str, products: int, decays: int = HEAD_DIM) -> tuple[float, float]:
    """Count q, k, v, o in bf16 and so many decays in fp32; the state is read or added to once a product."""
    size, flops = HEAD_DIM * 4 * BF16 + decays * FP32, 2.0 * products * HEAD_DIM**2
    return (size, flops) if which == "forward" else (size + HEAD_DIM * 7 * BF16 + 2 * decays * FP32, 3 * flops)


OPERATIONS: dict[str, Operation] = {
    "taylor_attention": Operation(
        taylor.IMPLEMENTATIONS,
        _by_head(FEATURE_DIM, FEATURE_DIM, HEAD_DIM),
        lambda impl: functools.partial(taylor.taylor_attention, impl=impl),
        _taylor_cost,
    ),
    "attention": Operation(
        softmax.ATTENTION,
        _by_head(*(HEAD_DIM,) * 3),
        lambda impl: functools.partial(softmax.attention, impl=impl),
        _attention_cost,
        fallback=False,
    ),
    **{f"window_attention_{window}": _window(window) for window in WINDOWS},
    "gated_linear_attention": Operation(
        gated_linear_attention.IMPLEMENTATIONS, _gated_arrays, _gated, functools.partial(_recurrence_cost, products=2)
    ),
    "delta_rule": Operation(
        delta_rule.IMPLEMENTATIONS, _delta_arrays, _delta, functools.partial(_recurrence_cost, products=4)
    ),
    "simple_gla": Operation(
        gated_linear_attention.IMPLEMENTATIONS,
        _simple_arrays,
        _gated,
        functools.partial(_recurrence_cost, products=2, decays=1),
    ),
    "gated_delta_rule": Operation(
        delta_rule.IMPLEMENTATIONS,
        _gated_delta_arrays,
        _delta,
        functools.partial(_recurrence_cost, products=4, decays=1),
    ),
    "gated_short_conv": _conv(gated_conv.IMPLEMENTATIONS, gated_conv.gated_short_conv, taps=3, halves=2),
    "short_conv": _conv(conv.IMPLEMENTATIONS, functools.partial(conv.short_conv, silu=True), taps=4, halves=1),
    "residual_rms_norm": Operation(
        norm.IMPLEMENTATIONS,
        _norm_arrays,
        lambda impl: functools.partial(norm.residual_rms_norm, impl=impl),
        _norm_cost,
    ),
    "residual_layer_norm": Operation(
        norm.IMPLEMENTATIONS,
        functools.partial(_norm_arrays, weights=2),
        lambda impl: functools.partial(norm.residual_layer_norm, impl=impl),
        _norm_cost,
    ),
}


def program(operation: Operation, impl: str, which: str) -> Callable:
    """Return a function of the arrays, or of the results' gradients and the arrays, that runs a pass."""
    call = operation.run(impl)

    def both(gradients: Any, *arrays: jax.Array) -> Any:
        out, pull = jax.vjp(call, *arrays)
        return out, pull(gradients)

    return call if which == "forward" else both


def takes(operation: Operation, shape: Shape, which: str) -> list[Any]:
    """Return the shapes of what `program`'s function takes."""
    arrays = list(operation.arrays(shape))
    if which == "forward":
        return arrays
    # The plain form stands for all: they return the same, and it can be traced for any device.
    results = jax.eval_shape(operation.run("xla"), *arrays)
    return [jax.tree.map(lambda x: ShapeDtypeStruct(x.shape, x.dtype), results), *arrays]

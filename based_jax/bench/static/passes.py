"""The calls that read and write tokens once: Taylor attention, windows, gated convolutions, what has no TPU kernel.

Those with gradients read what they are given, and the gradients of what they return, once more, and write gradients.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from based_jax.bench.static.calls import Call
from based_jax.ops.cross_entropy import linear_cross_entropy
from based_jax.ops.gated_conv import gated_short_conv
from based_jax.ops.norm import residual_layer_norm, residual_rms_norm
from based_jax.ops.softmax import window_attention
from based_jax.ops.taylor import expanded_dim, taylor_attention
from based_jax.ops.tpu import bundles

WIDTH, TAPS, VOCABULARY = 1792, 3, 50_304

Shapes = tuple[jax.ShapeDtypeStruct, ...]
Kernels = dict[str, Callable[[bundles.Schedule], int]]


def window(window: int, *, gradients: bool, rows: int = 2, time: int = 2048, heads: int = 16, dim: int = 64) -> Call:
    """Return attention over a window of a sequence."""
    given = (jax.ShapeDtypeStruct((rows, time, heads, dim), jnp.bfloat16),) * 3
    sizes: dict[str, Any] = {"rows": rows, "time": time, "heads": heads, "window": window}
    kernels: Kernels = {"window_forward": functools.partial(bundles.of_window_forward, **sizes)}
    kernels |= {"window_gradients": functools.partial(bundles.of_window_gradients, **sizes)} if gradients else {}
    function = functools.partial(window_attention, window=window)
    return _call(function, given, kernels, gradients=gradients, tokens=rows * time, heads=heads)


def splash(window: int, rows: int = 2, time: int = 2048, heads: int = 16, dim: int = 64) -> Call:
    """Return the same in JAX's splash attention, forward."""
    given = (jax.ShapeDtypeStruct((rows, time, heads, dim), jnp.bfloat16),) * 3
    cycles = functools.partial(bundles.of_splash_attention, rows=rows, time=time, heads=heads, window=window)

    def function(*qkv: jax.Array, impl: str) -> jax.Array:
        return window_attention(*qkv, window=window, impl="tpu_splash" if impl == "tpu" else impl)

    kernels: Kernels = {"splash_mha_fwd_no_residuals": cycles}
    return _call(function, given, kernels, gradients=False, tokens=rows * time, heads=heads)


def taylor(values: int, *, gradients: bool, rows: int = 2, time: int = 2048, heads: int = 16, keys: int = 16) -> Call:
    """Return Taylor attention over a sequence, tokens lying on lanes as they come from projections."""
    given = tuple(jax.ShapeDtypeStruct((rows, heads, dim, time), jnp.bfloat16) for dim in (keys, keys, values))

    def function(*qkv: jax.Array, impl: str) -> jax.Array:
        o, _ = taylor_attention(*(jnp.moveaxis(x, 3, 1) for x in qkv), impl=impl)
        return jnp.moveaxis(o, 1, 3)

    cycles = functools.partial(bundles.of_taylor_chunks, rows=rows, time=time, heads=heads)
    forward, backward = (values, expanded_dim(keys)), (expanded_dim(keys), values)
    kernels: Kernels = {"taylor_chunks": functools.partial(cycles, state=forward)}
    of_gradients = functools.partial(cycles, state=backward)
    kernels |= dict.fromkeys(["taylor_query_gradients", "taylor_key_gradients"], of_gradients) if gradients else {}
    return _call(function, given, kernels, gradients=gradients, tokens=rows * time, heads=heads)


def gated_convolution(rows: int = 4, time: int = 2048) -> Call:
    """Return a gated short convolution of a layer of Based 1B's width with its gradients."""
    given = (
        jax.ShapeDtypeStruct((rows, time, 2 * WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((TAPS, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((2 * WIDTH,), jnp.float32),
    )

    def function(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, impl: str) -> jax.Array:
        return gated_short_conv(x, kernel, bias=bias, impl=impl)[0]

    cycles = functools.partial(bundles.of_gated_short_conv, rows=rows, time=time, channels=WIDTH)
    kernels: Kernels = {"gated_short_conv_forward": cycles, "gated_short_conv_gradients": cycles}
    return _call(function, given, kernels, gradients=True, tokens=rows * time)


def norm(operation: Callable, rows: int = 4, time: int = 2048) -> Call:
    """Return the residual's sum and its norm with gradients, which read the sum and not what was added."""
    parameters = 2 if operation is residual_layer_norm else 1
    stream, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, time, WIDTH), (WIDTH,)))
    given = stream, jax.ShapeDtypeStruct(stream.shape, jnp.bfloat16), *[weight] * parameters
    cycles = functools.partial(bundles.of_norm, rows=rows, time=time, channels=WIDTH)
    kernels: Kernels = {"residual_norm_forward": cycles, "residual_norm_gradients": cycles}
    call = _call(operation, given, kernels, gradients=True, tokens=rows * time)
    return call._replace(moved_bytes=call.moved_bytes - 2.0 * stream.size)


def entropy(rows: int = 4, time: int = 2048) -> Call:
    """Return the loss of a language model's head with gradients, whose products take longer than its bytes."""
    tokens = rows * time
    given = (
        jax.ShapeDtypeStruct((tokens, WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((VOCABULARY, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )

    def function(*arguments: jax.Array, impl: str) -> jax.Array:
        return linear_cross_entropy(*arguments, impl=impl)[0]

    flops = 3 * 2.0 * tokens * WIDTH * VOCABULARY
    return _call(function, given, {}, gradients=True, tokens=tokens, flops=flops)


def plain(rows: int = 4, time: int = 2048) -> Call:
    """Return a pass that only adds and rounds, of what the residual and its norm read and write forward."""
    stream = jax.ShapeDtypeStruct((rows, time, WIDTH), jnp.float32)
    given = stream, jax.ShapeDtypeStruct(stream.shape, jnp.bfloat16)

    def function(r: jax.Array, y: jax.Array, *, impl: str) -> tuple[jax.Array, jax.Array]:
        return r + y, (2 * r).astype(y.dtype)

    return _call(function, given, {}, gradients=False, tokens=rows * time)


def _call(
    function: Callable,
    given: Shapes,
    kernels: Kernels,
    *,
    gradients: bool,
    tokens: int,
    heads: int = 1,
    flops: float = 0,
) -> Call:
    """Return a call of arrays, whose products make so many FLOPs, and with gradients those of all floats."""
    results = jax.eval_shape(functools.partial(function, impl="xla"), *given)
    of_floats = [x for x in given if jnp.issubdtype(x.dtype, jnp.floating)]
    moved = _bytes(given) + _bytes(results) + gradients * (_bytes(given) + _bytes(results) + _bytes(of_floats))
    called = _with_gradients(function, results) if gradients else function
    arguments = (*given, *jax.tree.leaves(results)) if gradients else given
    return Call(called, lambda: arguments, (), moved, tokens, heads, given[0].shape, kernels, flops)


def _with_gradients(function: Callable, results: Any) -> Callable:
    """Return a function of arguments and cotangents that returns what `function` does, and gradients."""
    count = len(jax.tree.leaves(results))

    def both(*given: jax.Array, impl: str) -> Any:
        arguments, cotangents = given[:-count], jax.tree.unflatten(jax.tree.structure(results), given[-count:])
        floats = [i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of_floats(*values: jax.Array) -> Any:
            changed = dict(zip(floats, values, strict=True))
            return function(*(changed.get(i, x) for i, x in enumerate(arguments)), impl=impl)

        out, pullback = jax.vjp(of_floats, *(arguments[i] for i in floats))
        return out, pullback(cotangents)

    return both


def _bytes(tree: Any) -> float:
    return float(sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


CALLS: dict[str, Callable[[], Call]] = {
    "Taylor by chunks": functools.partial(taylor, 64, gradients=False),
    "Taylor by chunks, gradients": functools.partial(taylor, 64, gradients=True),
    "Taylor by chunks of V 112": functools.partial(taylor, 112, gradients=False),
    "Taylor by chunks of V 112, gradients": functools.partial(taylor, 112, gradients=True),
    "window of 64": functools.partial(window, 64, gradients=False),
    "window of 64, splash": functools.partial(splash, 64),
    "window of 129, gradients": functools.partial(window, 129, gradients=True),
    "gated convolution, gradients": gated_convolution,
    "residual and norm, gradients": functools.partial(norm, residual_rms_norm),
    "residual and layer norm, gradients": functools.partial(norm, residual_layer_norm),
    "cross-entropy, gradients": entropy,
    "one pass": plain,
}
FORMS = {
    "Taylor by chunks of V 112": ("tpu",),
    "Taylor by chunks of V 112, gradients": ("tpu",),
    "window of 64, splash": ("tpu",),
    "cross-entropy, gradients": ("xla",),
    "one pass": ("xla",),
}
"""Of calls that are not compiled in both."""

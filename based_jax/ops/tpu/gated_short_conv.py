"""The gated short convolution in TPU kernels, which halve the projection, convolve and gate in one pass.

Kernels: `pallas_kernels/tpu/gated_short_conv.py`. The backward pass saves the projection, and makes the rest anew.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.dims import BT, BTD
from based_jax.ops import sharded
from based_jax.ops.calls import GatedConvCall

DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
CHANNEL_MULTIPLE, MAX_CHANNELS, MAX_TAPS = 128, 8192, 8
PADDING_AGE = -1


def supports(call: GatedConvCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    (taps, channels), x = call.kernel.shape, call.x
    if x.dtype not in DTYPES:
        return f"x must be bfloat16 or float32, and is {x.dtype}"
    if channels % CHANNEL_MULTIPLE or channels > MAX_CHANNELS:
        return f"channels must be a multiple of {CHANNEL_MULTIPLE} up to {MAX_CHANNELS}, and are {channels}"
    if taps > MAX_TAPS:
        return f"there must be at most {MAX_TAPS} taps, and are {taps}"
    if not x.size * taps:
        return f"no dimension may be empty, and x is {x.shape}, the kernel {call.kernel.shape}"
    return sharded.mesh_refusal()


def compute(call: GatedConvCall, *, with_state: Callable[[GatedConvCall], BTD]) -> BTD:
    """Return y, each device for its rows; `with_state` does the same by other means, for the first tokens."""
    return sharded.per_device(functools.partial(_on_device, with_state), call, check_vma=False)


def _on_device(with_state: Callable[[GatedConvCall], BTD], call: GatedConvCall) -> BTD:
    bias = jnp.zeros(call.x.shape[2]) if call.bias is None else call.bias
    parameters = call.kernel.astype(jnp.float32), bias.astype(jnp.float32)[None]
    y = _convolved(*sharded.vary_alike(call.x, *parameters, _ages(call.segment_ids, call.x.shape[1])))
    if call.state is None or not (before := call.kernel.shape[0] - 1):
        return y
    ids = None if call.segment_ids is None else call.segment_ids[:, :before]
    return y.at[:, :before].set(with_state(call._replace(x=call.x[:, :before], segment_ids=ids)))


def _ages(numbers: BT | None, length: int) -> Int[Array, "_ {length}"]:
    """Return how many tokens of its document stand before each one, -1 of padding, where documents are unbroken."""
    place = jnp.arange(length, dtype=jnp.int32)[None]
    if numbers is None:
        return place
    begins = jnp.diff(numbers, axis=1, prepend=0) != 0
    first = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    return jnp.where(numbers == 0, PADDING_AGE, place - first).astype(jnp.int32)


@jax.custom_vjp
def _convolved(x, kernel, bias, ages):
    return _forward(x, kernel, bias, ages)[0]


def _forward(x, kernel, bias, ages):
    # Pallas' TPU modules take half a second to import and are needed only here and below.
    from pallas_kernels.tpu import gated_short_conv as kernels

    filled, age = _filled(x, ages)
    [y] = sharded.launch(kernels.forward, filled, kernel, bias, age)
    return y[:, : x.shape[1]], (x, kernel, bias, ages)


def _backward(saved, dy):
    from pallas_kernels.tpu import gated_short_conv as kernels

    x, kernel, bias, ages = saved
    filled, age = _filled(x, ages)
    dy = sharded.fill(dy, {1: filled.shape[1]})
    dx, sums = sharded.launch(kernels.gradients, filled, dy, kernel, bias, age)
    taps, channels = kernel.shape
    total = jnp.sum(sums, axis=0)
    return dx[:, : x.shape[1]], total[:taps][::-1, :channels], total[taps : taps + 1], None


_convolved.defvjp(_forward, _backward)


def _filled(x, ages):
    """Return both with as many tokens as the kernels have, padding behind the others."""
    from pallas_kernels.tpu import gated_short_conv as kernels

    block = kernels.block_tokens(x.shape[1], x.shape[2] // 2, x.dtype.itemsize)
    x = sharded.fill(x, {1: block})
    missing = x.shape[1] - ages.shape[1]
    return x, jnp.pad(ages, [(0, 0), (0, missing)], constant_values=PADDING_AGE)[:, None]

"""Short convolutions in Hopper kernels, plain ones and gated ones (`pallas_kernels/hopper/short_conv.py`).

They compute in fp32 from the inputs to the output, and keep no state: what an earlier one reaches, the first tokens, is
computed again with it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.dims import BT, BTD
from based_jax.ops import segments, sharded
from based_jax.ops.calls import GatedConvCall, ShortConvCall
from based_jax.ops.hopper import limits

TAP_COUNTS = range(2, 5)
CHANNEL_MULTIPLE = 128
TOKEN_MULTIPLE = 8


def supports(call: ShortConvCall) -> str | None:
    """Return why the kernels cannot run this call of `short_conv`, or None."""
    return kernels_support(call) if call.dilation == 1 else f"dilation must be 1, and is {call.dilation}"


def compute(call: ShortConvCall, *, with_state: Callable[[ShortConvCall], BTD]) -> BTD:
    """Return y, each device for its rows and channels; `with_state` as of `convolve`."""
    return convolve(call, gated=False, silu=call.silu, with_state=with_state)


def kernels_support(call: ShortConvCall | GatedConvCall) -> str | None:
    """Return why the kernels cannot convolve x, plain or halved, or None."""
    x, (taps, channels) = call.x, call.kernel.shape
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, and is {x.dtype}"
    if taps not in TAP_COUNTS:
        return f"the kernel must have {TAP_COUNTS[0]} to {TAP_COUNTS[-1]} taps, and has {taps}"
    if channels % CHANNEL_MULTIPLE:
        return f"the channels must be a multiple of {CHANNEL_MULTIPLE}, and are {channels}"
    if not 0 < x.size < limits.MAX_ELEMENTS:
        return f"there must be 1 to {limits.MAX_ELEMENTS - 1} elements, and are {x.size}"
    return limits.refusal()


def convolve(call: ShortConvCall | GatedConvCall, *, gated: bool, silu: bool, with_state: Callable[..., BTD]) -> BTD:
    """Run the kernels on each device's rows, of a plain convolution on its channels as well.

    Args:
      with_state: the same function of a call by other means, for the first tokens.
    """
    channels = None if gated else "heads"  # halves of a projection that is cut lie on different devices
    wide, rows = ("batch", None, channels), ("batch",)
    names = wide, (None, channels), (channels,), wide, rows

    def on_device(*arrays: jax.Array | None) -> Array:
        *grouped, ids = arrays
        x, kernel, bias, state = map(_joined, grouped)
        part = call._replace(x=x, kernel=kernel, bias=bias, state=state, segment_ids=ids)
        return _grouped(_on_device((gated, silu), with_state, part))

    def on_mesh(call: ShortConvCall | GatedConvCall) -> BTD:
        arguments = *map(_grouped, (call.x, call.kernel, call.bias, call.state)), call.segment_ids
        return _joined(sharded.per_shard(on_device, arguments, names, (wide,)))

    # A state is that of the first places, where padding may stand.
    return on_mesh(call) if call.state is None else segments.without_padding(on_mesh, "x")(call)


def _grouped(x: Array | None) -> Any:
    """Cut channels into groups, of which a device takes whole ones."""
    return None if x is None else x.reshape(*x.shape[:-1], -1, CHANNEL_MULTIPLE)


def _joined(x: Array | None) -> Any:
    return None if x is None else x.reshape(*x.shape[:-2], -1)


def _on_device(form: tuple[bool, bool], with_state: Callable[..., BTD], call: ShortConvCall | GatedConvCall) -> BTD:
    bias, ids = None if call.bias is None else call.bias.astype(jnp.float32), call.segment_ids
    y = _fused(form, *sharded.vary_alike(call.x, call.kernel.astype(jnp.float32), bias, ids))
    if call.state is None:
        return y
    head = slice(0, call.kernel.shape[0] - 1)
    first = call._replace(x=call.x[:, head], segment_ids=None if ids is None else ids[:, head])
    return y.at[:, head].set(with_state(first))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(form, x, kernel, bias, segment_ids):
    return _fused_fwd(form, x, kernel, bias, segment_ids)[0]


def _fused_fwd(form, x, kernel, bias, segment_ids):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import short_conv as kernels

    gated, silu = form
    forward = functools.partial(kernels.forward, kernels.Form(gated, silu, bias is not None))
    [y] = sharded.launch(forward, _pad(x), kernel, bias, _reach(segment_ids, kernel.shape[0]))
    return y[:, : x.shape[1]], (x, kernel, bias, segment_ids)


def _fused_bwd(form, saved, dy):
    from pallas_kernels.hopper import short_conv as kernels

    x, kernel, bias, segment_ids = saved
    gated, silu = form
    backward = functools.partial(kernels.backward, kernels.Form(gated, silu, bias is not None))
    dx, sums = sharded.launch(backward, _pad(x), kernel, _pad(dy), bias, _reach(segment_ids, kernel.shape[0]))
    dkernel, dbias = jnp.split(sums.sum(axis=0), [kernel.shape[0]])
    return dx[:, : x.shape[1]], dkernel, None if bias is None else dbias.reshape(-1), None


_fused.defvjp(_fused_fwd, _fused_bwd)


def _pad(x: Array) -> Array:
    return sharded.fill(x, {1: TOKEN_MULTIPLE})


def _reach(segment_ids: BT | None, taps: int) -> Int[Array, "B _"] | None:
    """Return how many of the W-1 tokens before each are of its document, up to a whole tile.

    It is -1 for padding, and `UNREADABLE_REACH` for all of a row that the kernels cannot read.
    """
    from pallas_kernels.hopper.short_conv import UNREADABLE_REACH

    if segment_ids is None:
        return None
    unreadable = segments.padding_within(segment_ids)
    ids = jnp.pad(segment_ids, ((0, 0), (taps - 1, -segment_ids.shape[1] % TOKEN_MULTIPLE)))
    own = ids[:, taps - 1 :]
    reach, joined = jnp.zeros_like(own), jnp.ones_like(own)
    for distance in range(1, taps):
        joined = joined * (ids[:, taps - 1 - distance : ids.shape[1] - distance] == own)
        reach = reach + joined
    return jnp.where(unreadable, UNREADABLE_REACH, jnp.where(own == 0, -1, reach)).astype(jnp.int32)

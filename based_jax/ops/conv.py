"""Causal depthwise convolution with a kernel of a few taps.

    y_t = f(sum_{w<W} kernel_w x_{t-(W-1-w)d} + b)          the last tap multiplies the current token; dilation d

f is SiLU where it is asked for. The state is the last (W-1) d + 1 inputs of each channel, in order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from based_jax.dims import BD, BT, BTD, BWD, WD, SegmentIds
from based_jax.errors import UserError
from based_jax.ops import long_conv, segments, sequence, sharded
from based_jax.ops.arguments import checked
from based_jax.ops.calls import Channels, Past, ShortConvCall
from based_jax.ops.decode_calls import ShortConvStepCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import short_conv as hopper_short_conv
from based_jax.ops.hopper import short_conv_step as hopper_short_conv_step
from based_jax.ops.precision import einsum, product_policy
from based_jax.ops.triton import toeplitz as triton_toeplitz

BSD = Float[Array, "B S D"]
BS = Int[Array, "B S"]
Reached = Float[Array, "B (W-1)*{dilation}+1 D"]
LastInputs = Float[Array, "B {width} D"]

MAX_UNROLLED_TAPS = 8
"""More shifted products are a scan, which is what a Toeplitz product can be faster than."""


@checked
def short_conv(
    x: BTD,
    kernel: WD,
    *,
    bias: Channels | None = None,
    silu: bool = False,
    dilation: int = 1,
    state: Past | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTD, Reached]:
    """Convolve each channel of x (B, T, D) over time with its column of kernel (W, D).

    Args:
      bias: added to the convolution, (D).
      silu: return SiLU of the sum.
      dilation: tokens from one tap to the next.
      state: last `reach` inputs before x; they belong to each row's first document.
      segment_ids: ids of packed documents, 0 for padding, whose output is 0 (see `ops/segments.py`).
      impl: "oracle" (window by window), "xla_steps" (token by token), "xla_taps" (W shifted products), "xla_toeplitz"
        (products in x's dtype; no packing; auto's for many taps and short sequences on a GPU), "hopper_taps" (Mosaic
        GPU kernels; bf16, 2 to 4 taps, no dilation, D a multiple of 128), "triton_tiles" (Triton kernels; bf16, auto's
        for many taps) or "auto".

    Returns:
      y in x's dtype, and the last `reach` inputs of each row's last document.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    width = _checked_reach("short_conv", kernel, dilation, state)
    call = ShortConvCall(x, kernel, bias, state, segment_ids, silu, dilation)
    y = dispatch("short_conv", IMPLEMENTATIONS, impl, call, CUT)
    return y, last_inputs(x, width, state, segment_ids)


@jax.named_scope("last_inputs")
def last_inputs(x: BSD, width: int, state: LastInputs | None, segment_ids: SegmentIds | None) -> LastInputs:
    """Return the last `width` inputs, of `state` and x, that belong to the last document; zeros for the others.

    Without ids x may be a tail of the inputs: `width` of them, or all.
    """
    inputs = _with_past(x, width, state)
    if segment_ids is None:
        return inputs[:, -width:]
    numbers = segments.numbered(segment_ids)
    real = jnp.concatenate([jnp.ones((x.shape[0], width), bool), numbers != 0], axis=1)
    newest = jnp.sort(jnp.where(real, jnp.arange(real.shape[1])[None], -1), axis=1)[:, -width:]
    owners = _ids_with_past(numbers, width)
    kept = jnp.take_along_axis(owners, newest, axis=1) == segments.last_id(numbers)[:, None]
    return jnp.where(kept[..., None], jnp.take_along_axis(inputs, newest[..., None], axis=1), 0)


def first_inputs_after(x: BSD, counts: Int[Array, "B"], state: BWD) -> BWD:
    """Return the last inputs of each row, as many as `state` has, after the first `counts` of x."""
    width = state.shape[1]
    places = counts[:, None] + jnp.arange(width)[None]
    return jnp.take_along_axis(_with_past(x, width, state), places[..., None], axis=1)


def _with_past(x: BSD, width: int, state: LastInputs | None) -> Float[Array, "B _ D"]:
    """Return the inputs behind those of `state`."""
    past = jnp.zeros((x.shape[0], width, x.shape[2]), x.dtype) if state is None else state.astype(x.dtype)
    return jnp.concatenate([past, x], axis=1)


def _ids_with_past(ids: BT, width: int) -> Int[Array, "B _"]:
    """Return the ids behind those of a state, which is of each row's first document."""
    return jnp.concatenate([jnp.repeat(segments.first_id(ids)[:, None], width, axis=1), ids], axis=1)


def reach(kernel_size: int, dilation: int) -> int:
    """Return the tokens from the first tap to the last."""
    return (kernel_size - 1) * dilation + 1


@checked
def short_conv_step(
    x: Float[Array, "B wide"],
    kernel: WD,
    state: Past,
    *,
    bias: Channels | None = None,
    silu: bool = False,
    dilation: int = 1,
    impl: str = "auto",
) -> tuple[BD, Reached]:
    """Return one token's output and the inputs that the next one needs; of more channels in x the first D are read.

    `impl` is "xla_taps", "oracle" (the same), "hopper_taps" (a Mosaic GPU kernel, which moves the inputs on where they
    lie; no dilation, D a multiple of 128) or "auto".
    """
    _checked_reach("short_conv_step", kernel, dilation, state)
    if x.shape[1] < kernel.shape[1]:
        raise UserError(f"short_conv_step: x has {x.shape[1]} channels; the taps have {kernel.shape[1]}.")
    call = ShortConvStepCall(x, kernel, state, bias, silu, dilation)
    return dispatch("short_conv_step", STEP_IMPLEMENTATIONS, impl, call)


def _stepped(call: ShortConvStepCall) -> tuple[BD, Past]:
    x = call.x[:, None, : call.kernel.shape[1]]
    state = jnp.concatenate([call.state[:, 1:], x.astype(call.state.dtype)], axis=1)
    y = jnp.einsum("BWD,WD->BD", state[:, :: call.dilation], call.kernel, precision=jax.lax.Precision.HIGHEST)
    return _finished(y, call.bias, call.silu).astype(call.x.dtype), state


def _checked_reach(operation: str, kernel: WD, dilation: int, state: Past | None) -> int:
    """Return the tokens from the first tap to the last, which a state has as well."""
    if dilation < 1:
        raise UserError(f"{operation}: dilation is {dilation}; it is at least 1.")
    width = reach(kernel.shape[0], dilation)
    if state is not None and state.shape[1] != width:
        raise UserError(f"{operation}: state has {state.shape[1]} inputs; of these taps it has {width}.")
    return width


def _finished(y: Float[Array, "*T D"], bias: Channels | None, silu: bool) -> Float[Array, "*T D"]:
    """Return f(y + bias) in fp32, or y."""
    if bias is not None:
        y = y.astype(jnp.float32) + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return jax.nn.silu(y.astype(jnp.float32)) if silu else y


def _composed(form: Callable, call: ShortConvCall) -> BTD:
    """Finish what a form of the convolution makes of all inputs in reach."""
    x, segment_ids, width = call.x, call.segment_ids, reach(call.kernel.shape[0], call.dilation)
    ids = None if segment_ids is None else _ids_with_past(segment_ids, width)
    y = form(_with_past(x, width, call.state), ids, call.kernel, call.dilation)
    y = _finished(y, call.bias, call.silu).astype(x.dtype)
    return y if segment_ids is None or call.bias is None else jnp.where((segment_ids == 0)[..., None], 0, y)


# Each form takes the past inputs in reach and the T new ones, S together, and returns the T convolutions; without ids
# all are of one document.


def _oracle(inputs: BSD, ids: BS | None, kernel: WD, dilation: int) -> BTD:
    """Multiply every window of W inputs with the kernel."""
    width = reach(kernel.shape[0], dilation)
    T = inputs.shape[1] - width
    taps = jnp.arange(T)[:, None] + jnp.arange(0, width, dilation)[None, :] + 1
    windows = inputs[:, taps].astype(jnp.float32)
    if ids is not None:
        same = (ids[:, taps] == ids[:, width:, None]) & (ids[:, width:, None] != 0)
        windows = jnp.where(same[..., None], windows, 0)
    return jnp.einsum("BTWD,WD->BTD", windows, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _recurrent(inputs: BSD, ids: BS | None, kernel: WD, dilation: int) -> BTD:
    """Take step after step over the tokens, clearing the state where a document begins."""
    width = reach(kernel.shape[0], dilation)
    ids = jnp.ones(inputs.shape[:2], jnp.int32) if ids is None else ids

    def token(carry, new):
        state, owner = carry
        x_BD, id_B = new
        kept = jnp.where((id_B == owner)[:, None, None], state, 0)
        y, stepped = _stepped(ShortConvStepCall(x_BD, kernel, kept, dilation=dilation))
        padding = (id_B == 0)[:, None]
        carry = (jnp.where(padding[..., None], 0, stepped), id_B)
        return carry, jnp.where(padding, 0, y)

    over_time = (jnp.moveaxis(inputs[:, width:], 1, 0), jnp.moveaxis(ids[:, width:], 1, 0))
    start = tuple(sharded.vary_alike(inputs[:, :width], ids[:, width - 1], like=(inputs, ids, kernel)))
    _, y = jax.lax.scan(token, start, over_time)
    return jnp.moveaxis(y, 0, 1)


def _shifted(inputs: BSD, ids: BS | None, kernel: WD, dilation: int) -> BTD:
    """Add W shifted copies of the inputs, each times its tap: one elementwise pass, or a scan where W is large."""
    if kernel.shape[0] <= MAX_UNROLLED_TAPS:
        return _unrolled(*sharded.vary_alike(inputs, ids, kernel), dilation)
    T = inputs.shape[1] - reach(kernel.shape[0], dilation)

    def add(y, tap):
        return y + _term(inputs, ids, kernel[tap], tap * dilation, T), None

    # The backward pass of a long sum would keep a term of every tap.
    [y] = sharded.vary_alike(jnp.zeros((inputs.shape[0], T, inputs.shape[2])), like=(inputs, ids, kernel))
    y, _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), y, jnp.arange(kernel.shape[0]))
    return y.astype(inputs.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _unrolled(inputs: BSD, ids: BS | None, kernel: WD, dilation: int) -> BTD:
    """Add all terms at once; left to itself XLA makes the gradients a nest of slices and updates, ten times slower."""
    T = inputs.shape[1] - reach(kernel.shape[0], dilation)
    terms = (_term(inputs, ids, weights, tap * dilation, T) for tap, weights in enumerate(kernel))
    return functools.reduce(jnp.add, terms).astype(inputs.dtype)


def _unrolled_fwd(inputs, ids, kernel, dilation):
    return _unrolled(inputs, ids, kernel, dilation), (inputs, ids, kernel)


def _unrolled_bwd(dilation, saved, dy):
    inputs, ids, kernel = saved
    dkernel = []
    for tap in range(kernel.shape[0]):
        given = _of_one_document(dy.astype(jnp.float32), ids, tap * dilation)
        dkernel.append(jnp.sum(given * _slice(inputs, tap * dilation, dy.shape[1]).astype(jnp.float32), axis=(0, 1)))
    return _unrolled_dinputs(dy, ids, kernel, dilation), None, jnp.stack(dkernel).astype(kernel.dtype)


def _unrolled_dinputs(dy: BTD, ids: BS | None, kernel: WD, dilation: int) -> BSD:
    """Add what each tap gives back to the inputs: shifted copies too, that one pass adds, where padded terms need more.

    The input at place s is the tap's of the output at s - tap d - 1.
    """
    width, T = reach(kernel.shape[0], dilation), dy.shape[1]
    outputs = jnp.pad(dy, ((0, 0), (width, width - 1), (0, 0)))
    owners = None if ids is None else jnp.pad(ids[:, width:], ((0, 0), (width, width - 1)))

    def term(tap: int) -> BSD:
        there = slice(width - 1 - tap * dilation, T + 2 * width - 1 - tap * dilation)
        x = outputs[:, there].astype(jnp.float32) * kernel[tap].astype(jnp.float32)[None, None]
        if ids is None or owners is None:
            return x
        return jnp.where(((owners[:, there] == ids) & (ids != 0))[..., None], x, 0.0)

    return functools.reduce(jnp.add, map(term, range(kernel.shape[0]))).astype(dy.dtype)


_unrolled.defvjp(_unrolled_fwd, _unrolled_bwd)


def _product(inputs: BSD, ids: BS | None, kernel: WD, dilation: int) -> BTD:
    """Multiply with the Toeplitz matrix of each channel."""
    dtype, precision = product_policy(inputs.dtype)
    width = reach(kernel.shape[0], dilation)
    taps = jnp.pad(_by_lag(kernel, dilation), ((0, inputs.shape[1] - width), (0, 0)))
    matrices = long_conv.toeplitz(taps.T, dtype)[..., width:]
    return einsum("BSD,DST->BTD", inputs.astype(dtype), matrices, precision, dtype).astype(inputs.dtype)


def _tiles(inputs: BSD, ids: BS | None, kernel: WD, dilation: int) -> BTD:
    """Multiply with tiles of the Toeplitz matrices, in kernels."""
    taps = _by_lag(kernel, dilation)
    return triton_toeplitz.convolve(inputs, taps, ids)[:, len(taps) :]


def _by_lag(kernel: WD, dilation: int) -> Float[Array, "reach D"]:
    """Return the tap of every lag that the kernel reaches, fp32."""
    lags = jnp.zeros((reach(kernel.shape[0], dilation), kernel.shape[1]), jnp.float32)
    return lags.at[::dilation].set(kernel[::-1].astype(jnp.float32))


def _supports_tiles(call: ShortConvCall) -> str | None:
    return triton_toeplitz.supports(call.x)


def _tiles_are_slower(call: ShortConvCall) -> str | None:
    """Return why other forms are faster, or None."""
    return _few_taps(call) or triton_toeplitz.slower(reach(call.kernel.shape[0], call.dilation))


def _supports_product(call: ShortConvCall) -> str | None:
    return None if call.segment_ids is None else "packed documents need a matrix each"


def _product_is_slower(call: ShortConvCall) -> str | None:
    """Return why the shifted products are the faster form, or None."""
    return _few_taps(call) or long_conv.product_is_slower(call.x.shape[1])


def _few_taps(call: ShortConvCall) -> str | None:
    taps = call.kernel.shape[0]
    return f"there are {taps} taps, no more than {MAX_UNROLLED_TAPS}" if taps <= MAX_UNROLLED_TAPS else None


def _term(inputs: BSD, ids: BS | None, weights: Channels, at, T: int) -> BTD:
    """Return what the inputs of one tap, `at` behind the first tap's, add to the T outputs."""
    x = _slice(inputs, at, T).astype(jnp.float32) * weights.astype(jnp.float32)[None, None]
    return _of_one_document(x, ids, at)


def _of_one_document(x: BTD, ids: BS | None, at) -> BTD:
    """Return x with zeros where the tap's input and the output are not of one document."""
    if ids is None:
        return x
    own = ids[:, ids.shape[1] - x.shape[1] :]
    same = (_slice(ids, at, x.shape[1]) == own) & (own != 0)
    return jnp.where(same[..., None], x, 0.0)


def _slice(x, at, T: int):
    return jax.lax.dynamic_slice_in_dim(x, at + 1, T, axis=1)


def _wide(call: ShortConvCall) -> BTD:
    """Add up the shifted products in fp32 from the inputs to the output."""
    return _composed(_shifted, call._replace(x=call.x.astype(jnp.float32))).astype(call.x.dtype)


def _through(form: Callable, **options: Any) -> Implementation:
    return Implementation(functools.partial(_composed, form), **options, by_place=("x",))


CUT = sequence.Tails(lambda call: reach(call.kernel.shape[0], call.dilation), lambda call: call.x)

IMPLEMENTATIONS = {
    "hopper_taps": Implementation(
        functools.partial(hopper_short_conv.compute, with_state=_wide), hopper_short_conv.supports, platform="cuda"
    ),
    "triton_tiles": Implementation(
        functools.partial(sharded.per_device, functools.partial(_composed, _tiles)),
        _supports_tiles,
        platform="cuda",
        slower=_tiles_are_slower,
        by_place=("x",),
    ),
    "xla_taps": _through(_shifted),
    "xla_toeplitz": _through(_product, supports=_supports_product, preferred="cuda", slower=_product_is_slower),
    "xla_steps": _through(_recurrent),
    "oracle": _through(_oracle),
}

STEP_IMPLEMENTATIONS = {
    "hopper_taps": Implementation(
        hopper_short_conv_step.compute,
        hopper_short_conv_step.supports,
        platform="cuda",
    ),
    "xla_taps": Implementation(_stepped),
    "oracle": Implementation(_stepped),
}

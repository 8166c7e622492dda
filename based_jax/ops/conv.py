"""Causal depthwise convolution with a kernel of a few taps.

    y_t = sum_{w<W} kernel_w x_{t-(W-1-w)d}          the last tap multiplies the current token; dilation d

The state is the last (W-1) d + 1 inputs of each channel, in order.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from based_jax.dims import BD, BT, BTD, WD
from based_jax.ops import segments
from based_jax.ops.dispatch import Implementation, dispatch

Past = Float[Array, "B _ D"]
BSD = Float[Array, "B S D"]
BS = Int[Array, "B S"]

UNROLLED = 8


def short_conv(
    x: BTD,
    kernel: WD,
    *,
    dilation: int = 1,
    state: Past | None = None,
    segment_ids: BT | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Convolve each channel of x (B, T, D) over time with its column of kernel (W, D).

    Args:
      dilation: tokens from one tap to the next.
      state: last `reach` inputs before x; they belong to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      return_state: return (y, last inputs of the last document) instead of y.
      impl: "oracle" (window by window), "recurrent" (token by token), "xla" (W shifted products) or "auto".

    Raises:
      UserError: `impl` is unknown.
    """
    width = reach(kernel.shape[0], dilation)
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    inputs, input_ids = _with_past(x, ids, width, state, segments.first_id(ids))
    y = dispatch("short_conv", IMPLEMENTATIONS, impl, inputs, input_ids, kernel, dilation)
    if not return_state:
        return y
    return y, last_inputs(x, width, state, segment_ids)


def last_inputs(x: BSD, width: int, state: Past | None, segment_ids: BT | None) -> Past:
    """Return the last `width` inputs, of `state` and x, that belong to the last document; zeros for the others.

    x may be a tail of the inputs: `width` of them, or all.
    """
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    inputs, input_ids = _with_past(x, ids[:, ids.shape[1] - x.shape[1] :], width, state, segments.first_id(ids))
    last = segments.last_id(ids)
    kept = (input_ids[:, -width:] == last[:, None]) & (last != 0)[:, None]
    return jnp.where(kept[..., None], inputs[:, -width:], 0)


def _with_past(x: BSD, ids: BS, width: int, state: Past | None, first: Int[Array, "B"]) -> tuple[Array, Array]:
    """Return the inputs behind those of `state`, and their ids, given each row's first document."""
    past = jnp.zeros((x.shape[0], width, x.shape[2]), x.dtype) if state is None else state.astype(x.dtype)
    past_ids = jnp.repeat(first[:, None], width, axis=1)
    return jnp.concatenate([past, x], axis=1), jnp.concatenate([past_ids, ids], axis=1)


def reach(kernel_size: int, dilation: int) -> int:
    """Return the tokens from the first tap to the last."""
    return (kernel_size - 1) * dilation + 1


def short_conv_step(x: BD, kernel: WD, state: Past, dilation: int = 1) -> tuple[BD, Past]:
    """Return one token's output and the inputs that the next one needs."""
    state = jnp.concatenate([state[:, 1:], x[:, None].astype(state.dtype)], axis=1)
    y = jnp.einsum("BWD,WD->BD", state[:, ::dilation], kernel, precision=jax.lax.Precision.HIGHEST)
    return y.astype(x.dtype), state


# Each form takes the past inputs in reach and the T new ones, S together, and returns the T outputs.


def _oracle(inputs: BSD, ids: BS, kernel: WD, dilation: int) -> BTD:
    """Multiply every window of W inputs with the kernel."""
    width = reach(kernel.shape[0], dilation)
    T = inputs.shape[1] - width
    taps = jnp.arange(T)[:, None] + jnp.arange(0, width, dilation)[None, :] + 1
    same = (ids[:, taps] == ids[:, width:, None]) & (ids[:, width:, None] != 0)
    windows = jnp.where(same[..., None], inputs[:, taps], 0).astype(jnp.float32)
    y = jnp.einsum("BTWD,WD->BTD", windows, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return y.astype(inputs.dtype)


def _recurrent(inputs: BSD, ids: BS, kernel: WD, dilation: int) -> BTD:
    """Run `short_conv_step` over the tokens, clearing the state where a document begins."""
    width = reach(kernel.shape[0], dilation)

    def token(carry, new):
        state, owner = carry
        x_BD, id_B = new
        kept = jnp.where((id_B == owner)[:, None, None], state, 0)
        y, stepped = short_conv_step(x_BD, kernel, kept, dilation)
        padding = (id_B == 0)[:, None]
        carry = (jnp.where(padding[..., None], 0, stepped), id_B)
        return carry, jnp.where(padding, 0, y)

    over_time = (jnp.moveaxis(inputs[:, width:], 1, 0), jnp.moveaxis(ids[:, width:], 1, 0))
    _, y = jax.lax.scan(token, (inputs[:, :width], ids[:, width - 1]), over_time)
    return jnp.moveaxis(y, 0, 1)


def _shifted(inputs: BSD, ids: BS, kernel: WD, dilation: int) -> BTD:
    """Add W shifted copies of the inputs, each times its tap: one elementwise pass, or a scan where W is large."""
    width = reach(kernel.shape[0], dilation)
    T = inputs.shape[1] - width
    own = ids[:, width:]

    def add(y, tap_and_weights):
        tap, weights = tap_and_weights
        x, x_ids = (jax.lax.dynamic_slice_in_dim(z, tap * dilation + 1, T, axis=1) for z in (inputs, ids))
        same = (x_ids == own) & (own != 0)
        term = x.astype(jnp.float32) * weights.astype(jnp.float32)[None, None, :]
        return y + jnp.where(same[..., None], term, 0.0), None

    y = jnp.zeros((inputs.shape[0], T, inputs.shape[2]), jnp.float32)
    if kernel.shape[0] <= UNROLLED:
        for tap in range(kernel.shape[0]):
            y, _ = add(y, (tap, kernel[tap]))
    else:  # the backward pass of a long sum would keep a term of every tap
        y, _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), y, (jnp.arange(kernel.shape[0]), kernel))
    return y.astype(inputs.dtype)


IMPLEMENTATIONS = {
    "xla": Implementation(_shifted),
    "recurrent": Implementation(_recurrent),
    "oracle": Implementation(_oracle),
}

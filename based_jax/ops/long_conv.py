"""Causal depthwise convolution with a kernel as long as the sequence (Hyena, arXiv 2302.10866, section 3.3).

    y_t = sum_{s<=t} kernel_{t-s} u_s          s in the document of t

It has no state but its inputs. By FFT time is T log T, for each document of a row where rows are packed; a product with
the Toeplitz matrix of the kernel takes T^2, and less time than that on tensor cores while T is short. Kernels multiply
with the matrix's tiles, which they share among all rows and documents.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax import devices
from based_jax.dims import BT, BTD, SegmentIds
from based_jax.ops.arguments import checked
from based_jax.ops.calls import TD, LongConvCall
from based_jax.ops.dispatch import Implementation, dispatch, target_device_kind
from based_jax.ops.precision import EXACT, einsum, product_policy
from based_jax.ops.triton import toeplitz as triton_toeplitz


@checked
def long_conv(u: BTD, kernel: TD, *, segment_ids: SegmentIds | None = None, impl: str = "auto") -> BTD:
    """Convolve each channel of u (B, T, D) with its column of kernel (T, D), whose row l is the tap of lag l.

    Args:
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "oracle" (quadratic), "xla_fft" (in fp32), "xla_toeplitz" (products in u's dtype; no packing; auto's for
        short sequences on a GPU), "triton_tiles" (Triton kernels, bf16) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    return dispatch("long_conv", IMPLEMENTATIONS, impl, LongConvCall(u, kernel, segment_ids))


def fft_flops(length: int) -> int:
    """Return the FLOPs of a token and channel: three FFTs of twice the length at 5 N log2 N."""
    return 3 * 5 * 2 * math.ceil(math.log2(2 * length))


def _oracle(call: LongConvCall) -> BTD:
    """Multiply with the whole Toeplitz matrix of each channel."""
    u, kernel = call.u, call.kernel
    ids = jnp.ones(u.shape[:2], jnp.int32) if call.segment_ids is None else call.segment_ids
    time = jnp.arange(u.shape[1])
    lag = time[:, None] - time[None, :]
    taps = jnp.where((lag >= 0)[..., None], kernel.astype(jnp.float32)[jnp.maximum(lag, 0)], 0.0)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]
    y = jnp.einsum("BTS,TSD,BSD->BTD", same.astype(jnp.float32), taps, u.astype(jnp.float32), precision=EXACT)
    return y.astype(u.dtype)


def toeplitz(taps: Float[Array, "*B T"], dtype: Any) -> Float[Array, "*B S T"]:
    """Return m with m_st = taps_{t-s} for t >= s and 0 elsewhere: u_s m_st summed over s is the convolution.

    Rows of a circulant matrix follow from each other by one place, so that they are one sequence, repeated and cut
    anew; gradients are then sums, not scatters. Rounding comes after it all, so that these sums are fp32.
    """
    taps = taps.astype(jnp.float32)
    T = taps.shape[-1]
    around = jnp.concatenate([taps, jnp.zeros_like(taps)], axis=-1)
    repeated = jnp.broadcast_to(around[..., None, :], (*taps.shape[:-1], T, 2 * T))
    repeated = repeated.reshape(*taps.shape[:-1], 2 * T * T)[..., : T * (2 * T - 1)]
    return repeated.reshape(*taps.shape[:-1], T, 2 * T - 1)[..., :T].astype(dtype)


def _product(call: LongConvCall) -> BTD:
    """Multiply with the Toeplitz matrix of each channel."""
    dtype, precision = product_policy(call.u.dtype)
    matrices = toeplitz(call.kernel.T, dtype)
    return einsum("BSD,DST->BTD", call.u.astype(dtype), matrices, precision, dtype).astype(call.u.dtype)


def _supports_product(call: LongConvCall) -> str | None:
    return None if call.segment_ids is None else "packed documents need a matrix each"


def _product_is_slower(call: LongConvCall) -> str | None:
    """Return why the FFT is the faster form, or None."""
    return product_is_slower(call.u.shape[1])


def product_is_slower(time: int) -> str | None:
    """Return why a product with a Toeplitz matrix is slower than other forms of a convolution, or None."""
    most = devices.crossovers(target_device_kind()).toeplitz_tokens
    return None if time <= most else f"T is {time}, above {most}"


def _supports_tiles(call: LongConvCall) -> str | None:
    return triton_toeplitz.supports(call.u)


def _tiles_are_slower(call: LongConvCall) -> str | None:
    return triton_toeplitz.slower(call.u.shape[1])


def _fft(call: LongConvCall) -> BTD:
    u, kernel = call.u.astype(jnp.float32), call.kernel.astype(jnp.float32)
    y = _convolve(u, kernel) if call.segment_ids is None else _packed(u, kernel, call.segment_ids)
    return y.astype(call.u.dtype)


def _convolve(u: BTD, kernel: TD) -> BTD:
    T = u.shape[1]
    spectrum = jnp.fft.rfft(u, n=2 * T, axis=1) * jnp.fft.rfft(kernel, n=2 * T, axis=0)[None]
    return jnp.fft.irfft(spectrum, n=2 * T, axis=1)[:, :T]


@jax.custom_vjp
def _packed(u: BTD, kernel: TD, segment_ids: BT) -> BTD:
    """Convolve the documents one after another: as many passes as the fullest row has documents.

    A loop of unknown length has no reverse-mode derivative of its own; here it is another such loop.
    """

    def add(d, y):
        own = (segment_ids == d)[..., None]
        return jnp.where(own, _convolve(jnp.where(own, u, 0.0), kernel), y)

    return jax.lax.fori_loop(1, 1 + jnp.max(segment_ids), add, jnp.zeros_like(u))


def _packed_forward(u, kernel, segment_ids):
    return _packed(u, kernel, segment_ids), (u, kernel, segment_ids)


def _packed_backward(saved, grad):
    u, kernel, segment_ids = saved

    def add(d, grads):
        own = (segment_ids == d)[..., None]
        _, pullback = jax.vjp(_convolve, jnp.where(own, u, 0.0), kernel)
        grad_u, grad_kernel = pullback(jnp.where(own, grad, 0.0))
        return jnp.where(own, grad_u, grads[0]), grads[1] + grad_kernel

    count = jnp.max(segment_ids)
    return *jax.lax.fori_loop(1, 1 + count, add, (jnp.zeros_like(u), jnp.zeros_like(kernel))), None


_packed.defvjp(_packed_forward, _packed_backward)


IMPLEMENTATIONS = {
    "triton_tiles": Implementation(
        triton_toeplitz.compute, _supports_tiles, platform="cuda", slower=_tiles_are_slower, by_place=("u",)
    ),
    "xla_fft": Implementation(_fft, by_place=("u",)),
    "xla_toeplitz": Implementation(_product, _supports_product, preferred="cuda", slower=_product_is_slower),
    "oracle": Implementation(_oracle, by_place=("u",)),
}

"""Gated linear attention by chunks in Triton kernels, with one decay a head or one for each key channel."""

from based_jax import devices
from based_jax.dims import BHKV, BTHV
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.decays import one_chunk_is_faster
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.triton import channel_decays, chunks, one_decay


def supports(call: MatrixStateCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return chunks.supports(call.v, call.k.shape[-1])


def slower(call: MatrixStateCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    reason = chunks.slower(call.v)
    if reason or call.log_decay.shape[-1] > 1:
        return reason
    most = devices.crossovers(target_device_kind()).one_decay_one_chunk_tokens_beside_chunks
    return one_chunk_is_faster(call.v.shape[1], most, call.k.shape[-1] * call.v.shape[-1])


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return one_decay.compute(call) if call.log_decay.shape[-1] == 1 else channel_decays.compute(call)

"""Gated linear attention by chunks in Triton kernels, with one decay a head or one for each key channel."""

from based_jax import devices
from based_jax.dims import BHKV, BTHV
from based_jax.ops.decays import one_chunk_is_faster
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.triton import channel_decays, chunks, one_decay


def supports(xs, bonus, scale, state, segment_ids) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    _, k, v, _ = xs
    return chunks.supports(v, k.shape[-1]) if bonus is None else "it takes no bonus"


def slower(xs, bonus, scale, state, segment_ids) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    _, k, v, log_decay = xs
    reason = chunks.slower(v)
    if reason or log_decay.shape[-1] > 1:
        return reason
    most = devices.crossovers(target_device_kind()).one_decay_one_chunk_tokens_beside_chunks
    return one_chunk_is_faster(v.shape[1], most, k.shape[-1] * v.shape[-1])


def compute(xs, bonus, scale, state, segment_ids) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    q, k, v, log_decay = xs
    if log_decay.shape[-1] == 1:
        return one_decay.one_decay(q, k, v, log_decay, None, scale, state, segment_ids)
    return channel_decays.channel_decays(q, k, v, log_decay, (), scale, state, segment_ids)

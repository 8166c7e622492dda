"""The gated delta rule by chunks in Triton kernels, with one decay a head or one for each key channel."""

from collections.abc import Callable

from based_jax.dims import BHKV, BTHV
from based_jax.ops.decays import as_dplr
from based_jax.ops.triton import chunks, dplr, one_decay


def slower(xs, scale, state, segment_ids, *, steps_support: Callable) -> str | None:
    """Return why `auto` leaves a call to others, or None; `steps_support` as of `dplr.slower`."""
    _, _, v, log_decay, _ = xs
    if log_decay.shape[-1] == 1:
        return chunks.slower(v)
    return dplr.slower(xs, scale, state, segment_ids, steps_support=steps_support)


def compute(xs, scale, state, segment_ids) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    q, k, v, log_decay, beta = xs
    if log_decay.shape[-1] > 1:
        return dplr.compute(as_dplr(*xs), scale, state, segment_ids)
    return one_decay.one_decay(q, k, v, log_decay, beta, scale, state, segment_ids)

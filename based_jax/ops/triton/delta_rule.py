"""The gated delta rule by chunks in Triton kernels, with one decay a head or one for each key channel."""

from collections.abc import Callable

from based_jax.dims import BHKV, BTHV
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.decays import as_dplr
from based_jax.ops.triton import chunks, dplr, one_decay


def slower(call: MatrixStateCall, *, steps_support: Callable) -> str | None:
    """Return why `auto` leaves a call to others, or None; `steps_support` as of `dplr.slower`."""
    if call.log_decay.shape[-1] == 1:
        return chunks.slower(call.v)
    return dplr.slower(call, steps_support=steps_support)


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return one_decay.compute(call) if call.log_decay.shape[-1] == 1 else dplr.compute(as_dplr(call))

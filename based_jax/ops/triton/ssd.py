"""Which calls of Mamba-2's state space go by chunks in Triton kernels, as those of gated linear attention they are."""

from based_jax.ops.calls import SSDCall
from based_jax.ops.triton import chunks


def supports(call: SSDCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return chunks.supports(call.x, call.B.shape[3])


def slower(call: SSDCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    return chunks.slower(call.x)

"""Mamba-2's state space by chunks in Triton kernels, as the gated linear attention that it is.

The kernels read B and C as they are, of groups of heads, and sum the gradients over a group (`one_decay.py`).
"""

import jax.numpy as jnp

from based_jax.ops import sharded
from based_jax.ops.calls import BHNP, BTHP, MatrixStateCall, SSDCall
from based_jax.ops.decays import stepped
from based_jax.ops.triton import chunks, one_decay


def supports(call: SSDCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return chunks.supports(call.x, call.B.shape[3])


def slower(call: SSDCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    return chunks.slower(call.x)


def compute(call: SSDCall) -> tuple[BTHP, BHNP]:
    """Return y and the state after the last token, each device for its rows, its heads and their groups."""
    heads, groups = call.x.shape[2], call.B.shape[2]
    if groups > 1 and sharded.axes_of("heads", heads) != sharded.axes_of("groups", groups):
        call = call._replace(B=jnp.repeat(call.B, heads // groups, 2), C=jnp.repeat(call.C, heads // groups, 2))
    return sharded.per_device(_on_device, call)


def _on_device(call: SSDCall) -> tuple[BTHP, BHNP]:
    v, log_decay = stepped(call.x, call.dt, call.A)
    return one_decay.compute(
        MatrixStateCall(call.C, call.B, v, log_decay, scale=1.0, state=call.state, segment_ids=call.segment_ids)
    )

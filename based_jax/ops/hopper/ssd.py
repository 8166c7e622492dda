"""Mamba-2's state space in Mamba's Hopper kernels, with the head's step and rate in each of its channels."""

import einops
import jax

from based_jax.ops.calls import BHNP, BTHP, SelectiveScanCall, SSDCall
from based_jax.ops.hopper import selective_scan


def supports(call: SSDCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    if (groups := call.B.shape[2]) > 1:
        return f"B and C must be of one group, and are of {groups}"
    return selective_scan.supports(jax.eval_shape(_by_channel, call))


def compute(call: SSDCall) -> tuple[BTHP, BHNP]:
    """Return y and the state after the last token, each device for its rows and all heads."""
    y, state = selective_scan.compute(_by_channel(call))
    heads = call.x.shape[2]
    y = einops.rearrange(y, "B T (H P) -> B T H P", H=heads)
    return y, einops.rearrange(state, "B (H P) N -> B H N P", H=heads)


def _by_channel(call: SSDCall) -> SelectiveScanCall:
    """Return the same call with each head's step and rate in all of its channels."""
    width, states = call.x.shape[3], call.B.shape[3]
    return SelectiveScanCall(
        u=einops.rearrange(call.x, "B T H P -> B T (H P)"),
        dt=einops.repeat(call.dt, "B T H -> B T (H P)", P=width),
        A=einops.repeat(call.A, "H -> (H P) N", P=width, N=states),
        B=call.B[:, :, 0],
        C=call.C[:, :, 0],
        state=None if call.state is None else einops.rearrange(call.state, "B H N P -> B (H P) N"),
        segment_ids=call.segment_ids,
    )

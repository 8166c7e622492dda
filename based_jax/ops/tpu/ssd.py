"""Mamba-2's state space by chunks in TPU kernels, as the gated linear attention that it is (see `matrix_states.py`)."""

import jax.numpy as jnp

from based_jax.ops.calls import BHNP, BTHP, MatrixStateCall, SSDCall
from based_jax.ops.decays import stepped
from based_jax.ops.tpu import matrix_states


def supports(call: SSDCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return matrix_states.supports(as_attention(call))


def slower(call: SSDCall) -> str | None:
    """Return why XLA is faster, or None."""
    return matrix_states.slower(as_attention(call))


def compute(call: SSDCall) -> tuple[BTHP, BHNP]:
    """Return y and the state after the last token, each device for its rows and heads."""
    return matrix_states.compute(as_attention(call))


def as_attention(call: SSDCall) -> MatrixStateCall:
    """Return the call of gated linear attention that equals it; B and C are repeated for the heads of their groups."""
    v, log_decay = stepped(call.x, call.dt, call.A)
    B, C = (jnp.repeat(x, call.x.shape[2] // x.shape[2], axis=2) for x in (call.B, call.C))
    return MatrixStateCall(C, B, v, log_decay, scale=1.0, state=call.state, segment_ids=call.segment_ids)

"""Mamba-2's state space (SSD): a selective scan whose decay is one number a head (arXiv 2405.21060, section 2).

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T          y_t = C_t^T S_t

It is gated linear attention with queries C, keys B, values dt x and log-decay dt A, without a scale; and it is Mamba's
scan with the head's step and rate in each of its P channels, which is how few states run in fp32 and on few tokens. B
and C are shared by the heads of a group. The state is (B, H, N, P) fp32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import SegmentIds
from based_jax.ops import sequence
from based_jax.ops.arguments import checked
from based_jax.ops.calls import BHNP, BTGN, BTH, BTHP, SSDCall
from based_jax.ops.decays import finite, initial_state, stepped
from based_jax.ops.decode_calls import BH
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from based_jax.ops.hopper import ssd as hopper_ssd
from based_jax.ops.tpu import ssd as tpu_ssd
from based_jax.ops.triton import ssd as triton_ssd

BHP = Float[Array, "B H P"]
BGN = Float[Array, "B G N"]


@checked
def ssd(
    x: BTHP,
    dt: BTH,
    A: Float[Array, "H"],
    B: BTGN,
    C: BTGN,
    *,
    state: BHNP | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTHP, BHNP]:
    """Scan x (B, T, H, P) with steps dt >= 0 (B, T, H), A < 0 (H,), and B, C (B, T, G, N) of G groups of heads.

    Args:
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "oracle" and "xla_steps" (token by token), "xla_chunks" (gated linear attention's), "hopper_steps" (Mamba's
        Mosaic GPU kernels; one group, channels a multiple of 128, 8, 16, 24 or 32 states), "triton_chunks" (gated
        linear attention's, of bf16; at most 256 states), "tpu_chunks" (likewise, of bf16 or fp32; at most 256 states,
        512 channels) or "auto".

    Returns:
      y in x's dtype, and the state (B, H, N, P) after the last token, fp32.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    call = SSDCall(x, dt.astype(jnp.float32), finite(A.astype(jnp.float32)), B, C, state, segment_ids)
    return dispatch("ssd", IMPLEMENTATIONS, impl, call, _cut)


@checked
@jax.named_scope("ssd_step")
def ssd_step(
    x: BHP, dt: BH, A: Float[Array, "H"], B: BGN, C: BGN, state: BHNP, *, impl: str = "auto"
) -> tuple[BHP, BHNP]:
    """Return one token's output and the state after it; `impl` is one of `ops/matrix_state_step.py`."""
    q, k, v, log_decay = _attention(x, dt, finite(A.astype(jnp.float32)), B, C)
    return gated_linear_attention_step(q, k, v, log_decay, state, scale=1.0, impl=impl)


def _attention(x, dt, A, B, C):
    """Return queries, keys, values and log-decays by head."""
    B, C = (jnp.repeat(y, x.shape[-2] // y.shape[-2], axis=-2) for y in (B, C))
    return C, B, *stepped(x, dt, A)


def _as_attention(call: SSDCall, *, impl: str) -> tuple[BTHP, BHNP]:
    q, k, v, log_decay = _attention(call.x, call.dt, call.A, call.B, call.C)
    return gated_linear_attention(
        q, k, v, log_decay, scale=1.0, state=call.state, segment_ids=call.segment_ids, impl=impl
    )


def _kept(call: SSDCall) -> Float[Array, "B H 1 1"]:
    """Return what the tokens of a call leave of a state."""
    return jnp.exp(sequence.total(call.dt, call.segment_ids) * call.A[None])[..., None, None]


def _empty(call: SSDCall) -> BHNP:
    batch, _, heads, channels = call.x.shape
    return initial_state(batch, heads, call.B.shape[-1], channels)


def _cut(run: sequence.Run, call: SSDCall) -> tuple[BTHP, BHNP]:
    """Cut time over devices; several groups are repeated for their heads, over which other devices may be."""
    heads, groups = call.x.shape[2], call.B.shape[2]
    if groups > 1:
        call = call._replace(B=jnp.repeat(call.B, heads // groups, 2), C=jnp.repeat(call.C, heads // groups, 2))
    return sequence.decayed(_empty, _kept)(run, call)


IMPLEMENTATIONS = {
    "triton_chunks": Implementation(triton_ssd.compute, triton_ssd.supports, platform="cuda", slower=triton_ssd.slower),
    "hopper_steps": Implementation(hopper_ssd.compute, hopper_ssd.supports, platform="cuda"),
    "tpu_chunks": Implementation(tpu_ssd.compute, tpu_ssd.supports, platform="tpu"),
    "xla_chunks": Implementation(functools.partial(_as_attention, impl="xla_chunks")),
    "xla_steps": Implementation(functools.partial(_as_attention, impl="xla_steps")),
    "oracle": Implementation(functools.partial(_as_attention, impl="oracle")),
}

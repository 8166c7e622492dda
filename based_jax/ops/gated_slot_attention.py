"""Gated slot attention: softmax over M slots that keys and values are written into and forgotten from.

    K_t = K_{t-1} diag(a_t) + k_t s_t^T      p_t = softmax(scale q_t^T K_t)          (arXiv 2409.07146, eq. 5 to 7)
    V_t = diag(a_t) V_{t-1} + s_t v_t^T      o_t = p_t^T V_t

Two passes of gated linear attention. The second is the operation of that name with queries p and keys s. In the first
it is the values s that decay, each slot by itself, since what is read are the slots: its chunks are here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHK, BHKV, BHV, BT, BTHK, BTHV
from based_jax.ops import scan
from based_jax.ops.decays import weighted_sums
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.gated_linear_attention import CHUNK_TOKENS, gated_linear_attention, gated_linear_attention_step
from based_jax.ops.precision import EXACT, einsum

BTHM = Float[Array, "B T H M"]
BHM = Float[Array, "B H M"]


class SlotState(NamedTuple):
    """Keys (B, H, K, M) and values (B, H, M, V) of the slots, fp32."""

    keys: Float[Array, "B H K M"]
    values: Float[Array, "B H M V"]


def initial_state(batch: int, heads: int, key_dim: int, slots: int, value_dim: int) -> SlotState:
    """Return the empty slots."""
    return SlotState(jnp.zeros((batch, heads, key_dim, slots)), jnp.zeros((batch, heads, slots, value_dim)))


def gated_slot_attention(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    s: BTHM,
    log_decay: BTHM,
    *,
    scale: float | None = 1.0,
    state: SlotState | None = None,
    segment_ids: BT | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Attend over (B, T, H, .) arrays through M slots, s (B, T, H, M) saying how much of a token goes into each.

    Args:
      log_decay: at most 0, for each slot.
      state: slots to start from; they belong to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      return_state: return (o, slots after the last token) instead of o.
      impl: "xla_steps" (token by token), "oracle" (the same), "xla_chunks" (two passes, linear in T) or "auto".

    Raises:
      UserError: `impl` is unknown.
    """
    xs = (q, k, v, s.astype(jnp.float32), log_decay.astype(jnp.float32))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, state = dispatch("gated_slot_attention", IMPLEMENTATIONS, impl, xs, scale, state, segment_ids)
    return (o, state) if return_state else o


def gated_slot_attention_step(
    q: BHK, k: BHK, v: BHV, s: BHM, log_decay: BHM, state: SlotState, *, scale: float | None = 1.0
) -> tuple[BHV, SlotState]:
    """Return one token's output and the slots after it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q32, k32, s = (x.astype(jnp.float32) for x in (q, k, s))
    keys = state.keys * jnp.exp(log_decay)[..., None, :] + k32[..., :, None] * s[..., None, :]
    p = jax.nn.softmax(scale * jnp.einsum("BHK,BHKM->BHM", q32, keys, precision=EXACT))
    o, values = gated_linear_attention_step(p, s, v, log_decay, state.values, scale=1.0)
    return o, SlotState(keys, values)


def _recurrent(xs, scale, state, segment_ids) -> tuple[Any, Any]:
    def step(x, state):
        q, k, v, s, g = x
        return gated_slot_attention_step(q, k, v, s, g, state, scale=scale)

    return scan.over_tokens(step, xs, _empty(xs), state, segment_ids)


def _two_passes(xs, scale, state, segment_ids) -> tuple[Any, Any]:
    q, k, v, s, g = xs
    empty = _empty(xs)
    keys, values = (None, None) if state is None else state
    logits, keys = scan.over_chunks(_read_slots, (q, k, s, g), empty.keys, keys, segment_ids, CHUNK_TOKENS)
    p = jax.nn.softmax(scale * logits)
    o, values = gated_linear_attention(
        p, s, v, g, scale=1.0, state=values, segment_ids=segment_ids, return_state=True, impl="xla_chunks"
    )
    return o, SlotState(keys, values)


def _read_slots(xs, keys: BHKV, span: scan.Span):
    """Return q_t^T K_t of a chunk, sum_s (q_t.k_s) exp(b_t - b_s) s_s, and K after it."""
    q, k, s, g = (x.astype(jnp.float32) for x in xs)
    until = jnp.cumsum(g, axis=1)
    scores = einsum("BTHK,BSHK->BHTS", q, k, EXACT) * span.visible[:, None]
    logits = weighted_sums(scores, s, until)
    if not span.fresh:
        read = einsum("BTHK,BHKM->BTHM", q, keys, EXACT) * jnp.exp(until)
        logits = logits + read * span.reads[:, :, None, None]
    written = s * jnp.exp(until[:, -1:] - until) * span.writes[:, :, None, None]
    kept = jnp.where(span.keeps[:, None, None, None], keys * jnp.exp(until[:, -1])[:, :, None], 0.0)
    return logits, kept + einsum("BTHK,BTHM->BHKM", k, written, EXACT)


def _empty(xs) -> SlotState:
    q, _, v, s, _ = xs
    return initial_state(q.shape[0], q.shape[2], q.shape[3], s.shape[3], v.shape[3])


IMPLEMENTATIONS = {
    "xla_chunks": Implementation(_two_passes),
    "xla_steps": Implementation(_recurrent),
    "oracle": Implementation(_recurrent),
}

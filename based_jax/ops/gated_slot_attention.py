"""Gated slot attention: softmax over M slots that keys and values are written into and forgotten from.

    K_t = K_{t-1} diag(a_t) + k_t s_t^T      p_t = softmax(scale q_t^T K_t)          (arXiv 2409.07146, eq. 5 to 7)
    V_t = diag(a_t) V_{t-1} + s_t v_t^T      o_t = p_t^T V_t

Two passes of gated linear attention. The second is the operation of that name with queries p and keys s. In the first
it is the values s that decay, each slot by itself, since what is read are the slots: its chunks are here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHK, BHV, BTHK, BTHV, SegmentIds
from based_jax.ops import scan, sequence
from based_jax.ops.arguments import checked
from based_jax.ops.calls import BHKM, BHMV, BTHM, SlotAttentionCall, SlotState
from based_jax.ops.decays import LogDecays, weighted_sums
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.gated_linear_attention import CHUNK_TOKENS, gated_linear_attention, gated_linear_attention_step
from based_jax.ops.precision import EXACT, einsum

BHM = Float[Array, "B H M"]


def initial_state(batch: int, heads: int, key_dim: int, slots: int, value_dim: int) -> SlotState:
    """Return the empty slots."""
    return SlotState(
        jnp.zeros((batch, heads, key_dim, slots), jnp.float32), jnp.zeros((batch, heads, slots, value_dim), jnp.float32)
    )


@checked
def gated_slot_attention(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    s: BTHM,
    log_decay: BTHM,
    *,
    scale: float | None = 1.0,
    state: SlotState | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTHV, tuple[BHKM, BHMV]]:
    """Attend over (B, T, H, .) arrays through M slots, s (B, T, H, M) saying how much of a token goes into each.

    Args:
      log_decay: at most 0, for each slot.
      state: slots to start from; they belong to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "xla_steps" (token by token), "oracle" (the same), "xla_chunks" (two passes, linear in T) or "auto".

    Returns:
      o in v's dtype, and the slots after the last token, a `SlotState`.

    Raises:
      UserError: `impl` is unknown.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s, log_decay = s.astype(jnp.float32), log_decay.astype(jnp.float32)
    call = SlotAttentionCall(q, k, v, s, log_decay, scale, state, segment_ids)
    return dispatch("gated_slot_attention", IMPLEMENTATIONS, impl, call, CUT)


@checked
@jax.named_scope("gated_slot_attention_step")
def gated_slot_attention_step(
    q: BHK, k: BHK, v: BHV, s: BHM, log_decay: BHM, state: SlotState, *, scale: float | None = 1.0, impl: str = "auto"
) -> tuple[BHV, SlotState]:
    """Return one token's output and the slots after it; `impl` is one of `ops/matrix_state_step.py`, for the values."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q32, k32, s = (x.astype(jnp.float32) for x in (q, k, s))
    keys = state.keys * jnp.exp(log_decay)[..., None, :] + k32[..., :, None] * s[..., None, :]
    p = jax.nn.softmax(scale * jnp.einsum("BHK,BHKM->BHM", q32, keys, precision=EXACT))
    o, values = gated_linear_attention_step(p, s, v, log_decay, state.values, scale=1.0, impl=impl)
    return o, SlotState(keys, values)


def _recurrent(call: SlotAttentionCall) -> tuple[BTHV, SlotState]:
    def step(token, state):
        q, k, v, s, log_decay = token.q, token.k, token.v, token.s, token.log_decay
        return gated_slot_attention_step(q, k, v, s, log_decay, state, scale=call.scale, impl="oracle")

    return scan.over_tokens(step, call.tokens, _empty(call), call.state, call.segment_ids)


def _two_passes(call: SlotAttentionCall) -> tuple[BTHV, SlotState]:
    keys, values = (None, None) if call.state is None else call.state
    tokens, ids = call.keyed_tokens, call.segment_ids
    logits, keys = scan.over_chunks(_read_slots, tokens, _empty(call).keys, keys, ids, CHUNK_TOKENS)
    p = jax.nn.softmax(call.scale * logits)
    o, values = gated_linear_attention(
        p, call.s, call.v, call.log_decay, scale=1.0, state=values, segment_ids=ids, impl="xla_chunks"
    )
    return o, SlotState(keys, values)


def _read_slots(tokens, keys: BHKM, span: scan.Span):
    """Return q_t^T K_t of a chunk, sum_s (q_t.k_s) exp(b_t - b_s) s_s, and K after it."""
    q, k, s, g = (x.astype(jnp.float32) for x in (tokens.q, tokens.k, tokens.s, tokens.log_decay))
    until = LogDecays.until(g, span.visible)
    scores = einsum("BTHK,BSHK->BHTS", q, k, EXACT) * span.visible[:, None]
    logits = weighted_sums(scores, s, until)
    if not span.fresh:
        read = einsum("BTHK,BHKM->BTHM", q, keys, EXACT) * until.kept()
        logits = logits + read * span.reads[:, :, None, None]
    written = s * until.left() * span.writes[:, :, None, None]
    kept = jnp.where(span.keeps[:, None, None, None], keys * until.kept()[:, -1, :, None], 0.0)
    return logits, kept + einsum("BTHK,BTHM->BHKM", k, written, EXACT)


def _empty(call: SlotAttentionCall) -> SlotState:
    """Return the slots before the first token of a call."""
    batch, _, heads, key_dim = call.q.shape
    return initial_state(batch, heads, key_dim, call.s.shape[3], call.v.shape[3])


def _kept(call: SlotAttentionCall) -> SlotState:
    """Return what the tokens of a call leave of each slot."""
    kept = jnp.exp(sequence.total(call.log_decay, call.segment_ids))
    return SlotState(kept[:, :, None], kept[..., None])


CUT = sequence.decayed(_empty, _kept)

IMPLEMENTATIONS = {
    "xla_chunks": Implementation(_two_passes),
    "xla_steps": Implementation(_recurrent),
    "oracle": Implementation(_recurrent),
}

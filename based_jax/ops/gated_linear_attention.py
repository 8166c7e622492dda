"""Linear attention whose state decays: one operation for GLA, RetNet, HGRN2, lightning attention, SSD and RWKV-5/6.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          o_t = scale q_t^T S_t          (arXiv 2312.06635, equation 3)

The decay a_t = exp(log_decay_t) is one number for each key channel or one for each head. With a bonus u the state is
read before it is written, and the token itself counts by u instead (RWKV-5/6, arXiv 2404.05892, section 4.2):

    o_t = scale q_t^T (S_{t-1} + diag(u) k_t v_t^T)

The state is (B, H, K, V) fp32. Inside a chunk with cumulative log-decays b_t the pair t >= s has the weight
sum_k q_tk k_sk exp(b_tk - b_sk) (`ops/decays.py`).
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax import devices
from based_jax.dims import BHK, BHKV, BHV, BTHK, BTHV, SegmentIds
from based_jax.ops import matrix_state_step, scan, sequence
from based_jax.ops.arguments import checked
from based_jax.ops.bonus import read_apart
from based_jax.ops.calls import HK, Decay, MatrixStateCall
from based_jax.ops.decays import LogDecays, empty_state, pair_weights
from based_jax.ops.decode_calls import MatrixStepCall
from based_jax.ops.dispatch import Implementation, dispatch, target_device_kind
from based_jax.ops.hopper import gated_linear_attention as hopper_gated_linear_attention
from based_jax.ops.matrix_state_step import update_and_read
from based_jax.ops.precision import einsum, narrow_einsum, product_policy
from based_jax.ops.tpu import matrix_states as tpu_matrix_states
from based_jax.ops.triton import gated_linear_attention as triton_gated_linear_attention

CHUNK_TOKENS = 64


@checked
def gated_linear_attention(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_decay: Decay,
    *,
    bonus: HK | None = None,
    scale: float | None = None,
    state: BHKV | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTHV, BHKV]:
    """Attend over (B, T, H, .) arrays with a decaying state, for any T.

    Args:
      log_decay: at most 0; (B, T, H, K), or (B, T, H, 1) for one decay a head, which takes fewer operations.
      bonus: weight (H, K) of the token itself; the state is then read before it is written.
      scale: of the output; 1 / sqrt(K) where None.
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "xla_steps" (token by token), "oracle" (the same), "xla_chunks" (linear in T), "xla_quadratic" (one chunk;
        auto's for one decay a head, large states and short sequences on a GPU), "hopper_steps" (Mosaic GPU kernels,
        token by token; K at most 128), "triton_chunks" (on tensor cores; v in bf16, to which q and k are rounded; K at
        most 256), "tpu_chunks" (a Mosaic TPU kernel; v in bf16 or fp32, to which q and k are rounded; K at most 256, V
        512) or "auto".

    Returns:
      o in v's dtype, and the state (B, H, K, V) after the last token, fp32.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    log_decay = log_decay.astype(jnp.float32)
    call = MatrixStateCall(q, k, v, log_decay, bonus, scale=scale, state=state, segment_ids=segment_ids)
    return dispatch("gated_linear_attention", IMPLEMENTATIONS, impl, call, CUT)


@checked
def gated_linear_attention_step(
    q: BHK,
    k: BHK,
    v: BHV,
    log_decay: Float[Array, "B H #K"],
    state: BHKV,
    *,
    bonus: HK | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[BHV, BHKV]:
    """Return one token's output and the state after it; `impl` is one of `ops/matrix_state_step.py`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = MatrixStepCall(q, k, v, log_decay, state, bonus, scale=scale)
    return dispatch("gated_linear_attention_step", matrix_state_step.IMPLEMENTATIONS, impl, call)


def _recurrent(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    def step(token, state):
        q, k, v, log_decay = token.q, token.k, token.v, token.log_decay
        return update_and_read(MatrixStepCall(q, k, v, log_decay, state, call.bonus, scale=call.scale))

    return scan.over_tokens(step, call.tokens, empty_state(call), call.state, call.segment_ids)


def _chunked(call: MatrixStateCall, *, length: int | None = CHUNK_TOKENS) -> tuple[BTHV, BHKV]:
    """Quadratic inside chunks of `length` tokens, through the state between them; None makes it one chunk."""
    bonus, scale = call.bonus, call.scale

    def chunk(tokens, state: BHKV, span: scan.Span):
        q, k, v, g = tokens.q, tokens.k, tokens.v, tokens.log_decay
        dtype, precision = product_policy(v.dtype)
        until = LogDecays.until(g, span.visible)  # from the chunk's beginning to the state after each token
        seen = until if bonus is None else until.before()  # and to the state that each token reads
        q = q.astype(jnp.float32) * scale
        visible = span.visible if bonus is None else span.visible & ~jnp.eye(g.shape[1], dtype=bool)[None]
        weights = pair_weights(q, k.astype(jnp.float32), seen, until, visible, dtype, precision)
        o = narrow_einsum("BHTS,BSHV->BTHV", weights.astype(dtype), v.astype(dtype), precision)
        if bonus is not None:
            own = jnp.sum(q * bonus[None, None] * k.astype(jnp.float32), axis=-1, keepdims=True)
            o = o + own * v.astype(jnp.float32)
        if not span.fresh:
            read = q * seen.kept() * span.reads[:, :, None, None]
            o = o + einsum("BTHK,BHKV->BTHV", read.astype(dtype), state.astype(dtype), precision)

        written = k.astype(jnp.float32) * until.left() * span.writes[:, :, None, None]
        kept = jnp.where(span.keeps[:, None, None, None], state * until.kept()[:, -1, ..., None], 0.0)
        after = kept + einsum("BTHK,BTHV->BHKV", written.astype(dtype), v.astype(dtype), precision)
        return o.astype(v.dtype), after

    length = length or call.q.shape[1]
    return scan.over_chunks(chunk, call.tokens, empty_state(call), call.state, call.segment_ids, length)


def _one_chunk_is_slower(call: MatrixStateCall) -> str | None:
    """Return why several chunks are the faster XLA form, or None."""
    (_, T, _, K), V = call.q.shape, call.v.shape[-1]
    if call.log_decay.shape[-1] > 1:
        return "each key channel has a decay of its own"
    known = devices.crossovers(target_device_kind())
    most, least = known.one_decay_one_chunk_tokens, known.one_decay_one_chunk_state_elements_per_token
    if T > CHUNK_TOKENS and T * least > K * V:
        return f"states have {K * V} elements, fewer than {least} for each of {T} tokens"
    return None if most >= T else f"T is {T}, above {most}"


def _kept(call: MatrixStateCall) -> Float[Array, "B H #K 1"]:
    """Return what the tokens of a call leave of a state."""
    return jnp.exp(sequence.total(call.log_decay, call.segment_ids))[..., None]


CUT = sequence.decayed(empty_state, _kept)

IMPLEMENTATIONS = {
    "triton_chunks": Implementation(
        read_apart(triton_gated_linear_attention.compute),
        triton_gated_linear_attention.supports,
        platform="cuda",
        slower=triton_gated_linear_attention.slower,
    ),
    "hopper_steps": Implementation(
        read_apart(hopper_gated_linear_attention.compute),
        hopper_gated_linear_attention.supports,
        platform="cuda",
        slower=hopper_gated_linear_attention.slower,
    ),
    "tpu_chunks": Implementation(read_apart(tpu_matrix_states.compute), tpu_matrix_states.supports, platform="tpu"),
    "xla_chunks": Implementation(_chunked),
    "xla_quadratic": Implementation(
        functools.partial(_chunked, length=None), preferred="cuda", slower=_one_chunk_is_slower
    ),
    "xla_steps": Implementation(_recurrent),
    "oracle": Implementation(_recurrent),
}

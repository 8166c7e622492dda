"""Linear attention that corrects its state: the delta rule, its gated forms, and the diagonal plus low rank form.

    S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          o_t = scale q_t^T S_t          w = exp(log_decay)

is RWKV-7's recurrence (arXiv 2503.14456, equation 16). DeltaNet, Gated DeltaNet and KDA are a = w k, b = -beta k and
beta k for k: the state first decays, then its value under k moves by beta towards v (arXiv 2406.06484, 2412.06464).

In a chunk with the state S_0 before it, u_t = a_t^T S_{t-1} obeys a triangular system: with c_t the cumulative
log-decay and [x, y]_ts = sum_k x_tk y_sk exp(c_{t-1,k} - c_sk) for s < t (the WY form, arXiv 2406.06484, section 3.2),

    (I - [a, b]) U = [a, k] V + (a exp(c_{t-1})) S_0

after which o and S are those of gated linear attention with keys k, b and values v, u. The state is (B, H, K, V) fp32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHK, BHKV, BHV, BTHK, BTHV, SegmentIds
from based_jax.ops import matrix_state_step, scan, sequence
from based_jax.ops.arguments import checked
from based_jax.ops.calls import BTH, Decay, MatrixStateCall
from based_jax.ops.decays import LogDecays, as_dplr, empty_state, pair_weights
from based_jax.ops.decode_calls import BH, MatrixStepCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import delta_rule as hopper_delta_rule
from based_jax.ops.hopper import dplr as hopper_dplr
from based_jax.ops.hopper import recurrence as hopper_recurrence
from based_jax.ops.precision import EXACT, einsum, inner_precision, product_policy
from based_jax.ops.tpu import matrix_states as tpu_matrix_states
from based_jax.ops.triton import delta_rule as triton_delta_rule
from based_jax.ops.triton import dplr as triton_dplr

CHUNK_TOKENS = 64

BHKK = Float[Array, "B H K K"]


@checked
def delta_rule(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_decay: Decay,
    beta: BTH,
    *,
    scale: float | None = None,
    state: BHKV | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTHV, BHKV]:
    """Attend with the (gated) delta rule over (B, T, H, .) arrays, for any T.

    Args:
      k: keys; the publications normalise them to length 1.
      log_decay: at most 0; (B, T, H, K), or (B, T, H, 1) for one decay a head.
      beta: how far (B, T, H) the value under a key moves, 0 to 1 (2 for negative eigenvalues).
      scale, state, segment_ids: as of `dplr`.
      impl: one of `dplr`, or "hopper_chunks" (Mosaic GPU kernels on tensor cores; v in bf16, to which q and k are
        rounded; K at most 256, and 128 where channels have decays of their own), or "tpu_chunks" (a Mosaic TPU kernel;
        v in bf16 or fp32, to which q and k are rounded; K at most 256, V 512).

    Returns:
      As `dplr`.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = MatrixStateCall(q, k, v, log_decay, beta=beta, scale=scale, state=state, segment_ids=segment_ids)
    return dispatch("delta_rule", IMPLEMENTATIONS, impl, call, CUT)


@checked
def delta_rule_step(
    q: BHK,
    k: BHK,
    v: BHV,
    log_decay: Float[Array, "B H #K"],
    beta: BH,
    state: BHKV,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[BHV, BHKV]:
    """Return one token's output and the state after it; `impl` is one of `ops/matrix_state_step.py`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = MatrixStepCall(q, k, v, log_decay, state, beta=beta, scale=scale)
    return dispatch("delta_rule_step", matrix_state_step.IMPLEMENTATIONS, impl, call)


@checked
def dplr(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_decay: Decay,
    a: BTHK,
    b: BTHK,
    *,
    scale: float | None = None,
    state: BHKV | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTHV, BHKV]:
    """Attend with a transition that is diagonal plus a b^T, for any T.

    Args:
      log_decay: at most 0; (B, T, H, K), or (B, T, H, 1) for one decay a head.
      a, b: what a token reads of the state before it decays, and where it writes that to: (B, T, H, K).
      scale: of the output; 1 / sqrt(K) where None.
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "xla_steps" (token by token), "oracle" (the same), "xla_chunks" (linear in T), "hopper_steps" (Mosaic GPU
        kernels, token by token; K at most 128), "hopper_chunks" (Mosaic GPU kernels on tensor cores; v in bf16, to
        which q, k, a and b are rounded; K at most 64), "triton_chunks" (the same in Triton; K at most 256),
        "tpu_chunks" (a Mosaic TPU kernel; v in bf16 or fp32, to which q, k, a and b are rounded; K at most 256, V 512)
        or "auto".

    Returns:
      o in v's dtype, and the state (B, H, K, V) after the last token, fp32.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    a, b, log_decay = (x.astype(jnp.float32) for x in (a, b, log_decay))
    call = MatrixStateCall(q, k, v, log_decay, a=a, b=b, scale=scale, state=state, segment_ids=segment_ids)
    return dispatch("dplr", DPLR_IMPLEMENTATIONS, impl, call, CUT)


@checked
def dplr_step(
    q: BHK,
    k: BHK,
    v: BHV,
    log_decay: Float[Array, "B H #K"],
    a: BHK,
    b: BHK,
    state: BHKV,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[BHV, BHKV]:
    """Return one token's output and the state after it; `impl` is one of `ops/matrix_state_step.py`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    a, b = (x.astype(jnp.float32) for x in (a, b))
    call = MatrixStepCall(q, k, v, log_decay, state, a=a, b=b, scale=scale)
    return dispatch("dplr_step", matrix_state_step.IMPLEMENTATIONS, impl, call)


def _recurrent(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    def step(token, state):
        q, k, v, log_decay, a, b = _operands(token)
        return matrix_state_step.update_and_read(MatrixStepCall(q, k, v, log_decay, state, a=a, b=b, scale=call.scale))

    return scan.over_tokens(step, call.tokens, empty_state(call), call.state, call.segment_ids)


def _chunked(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Solve for what every token of a chunk reads, then attend; the solve is fp32."""
    dtype, precision = product_policy(call.v.dtype)
    inner = inner_precision(call.v.dtype)

    def chunk(tokens, state: BHKV, span: scan.Span):
        q, k, v, g, a, b = (x.astype(jnp.float32) for x in _operands(tokens))
        until = LogDecays.until(g, span.visible)
        seen = until.before()
        before = span.visible & ~jnp.eye(g.shape[1], dtype=bool)[None]

        def weights(x, y, mask, seen):
            return pair_weights(x, y, seen, until, mask, jnp.float32, inner)

        right = einsum("BHTS,BSHV->BHTV", weights(a, k, before, seen), v, inner)
        if not span.fresh:
            read = a * seen.kept() * span.reads[:, :, None, None]
            right = right + einsum("BTHK,BHKV->BHTV", read, state, inner)
        system = jnp.eye(g.shape[1], dtype=jnp.float32)[None, None] - weights(a, b, before, seen)
        u = jax.lax.linalg.triangular_solve(system, right, left_side=True, lower=True, unit_diagonal=True)
        u = jnp.moveaxis(u, 1, 2)

        o = jnp.zeros_like(v)
        left = until.left() * span.writes[:, :, None, None]
        after = jnp.where(span.keeps[:, None, None, None], state * until.kept()[:, -1, ..., None], 0.0)
        for keys, values in ((k, v), (b, u)):
            p = weights(q, keys, span.visible, until).astype(dtype)
            o = o + einsum("BHTS,BSHV->BTHV", p, values.astype(dtype), precision)
            after = after + einsum("BTHK,BTHV->BHKV", (keys * left).astype(dtype), values.astype(dtype), precision)
        if not span.fresh:
            read = q * until.kept() * span.reads[:, :, None, None]
            o = o + einsum("BTHK,BHKV->BTHV", read.astype(dtype), state.astype(dtype), precision)
        return (call.scale * o).astype(call.v.dtype), after

    return scan.over_chunks(chunk, call.tokens, empty_state(call), call.state, call.segment_ids, CHUNK_TOKENS)


def _operands(tokens: Any) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Return q, k, v, log_decay, a and b, of one token or of many."""
    return tokens.q, tokens.k, tokens.v, tokens.log_decay, tokens.a, tokens.b


def _through_dplr(compute: Callable, call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    return compute(as_dplr(call))


def _piece(run: sequence.Run, call: MatrixStateCall) -> tuple[BHKK, BHKV]:
    """Return the transition A of S' = A S + B over the tokens of a call, and the state after them.

    A is what becomes of the identity where no values are written: K more values a head in the same run.
    """
    batch, _, heads, keys = call.q.shape
    start = empty_state(call) if call.state is None else call.state
    identity = jnp.broadcast_to(jnp.eye(keys), (batch, heads, keys, keys))
    none = jnp.zeros((*call.v.shape[:-1], keys), call.v.dtype)
    both = call._replace(v=jnp.concatenate([none, call.v], axis=-1), state=jnp.concatenate([identity, start], axis=-1))
    after = run(both)[1]
    return after[..., :keys], after[..., keys:]


def _compose(earlier, later):
    """Return the transition and the state of two pieces."""
    (A1, S1), (A2, S2) = earlier, later
    return einsum("BHKL,BHLM->BHKM", A2, A1, EXACT), einsum("BHKL,BHLV->BHKV", A2, S1, EXACT) + S2


CUT = sequence.States(empty_state, _piece, _compose)

DPLR_IMPLEMENTATIONS = {
    "hopper_chunks": Implementation(
        hopper_dplr.compute, hopper_dplr.supports, platform="cuda", slower=hopper_dplr.slower, specialised=True
    ),
    "triton_chunks": Implementation(
        triton_dplr.compute,
        triton_dplr.supports,
        platform="cuda",
        slower=functools.partial(triton_dplr.slower, steps_support=hopper_recurrence.supports),
    ),
    "hopper_steps": Implementation(hopper_recurrence.compute, hopper_recurrence.supports, platform="cuda"),
    "tpu_chunks": Implementation(tpu_matrix_states.compute, tpu_matrix_states.supports, platform="tpu"),
    "xla_chunks": Implementation(_chunked),
    "xla_steps": Implementation(_recurrent),
    "oracle": Implementation(_recurrent),
}
IMPLEMENTATIONS = {
    "hopper_chunks": Implementation(
        hopper_delta_rule.compute,
        hopper_delta_rule.supports,
        platform="cuda",
        slower=hopper_delta_rule.slower,
        specialised=True,
    ),
    "triton_chunks": Implementation(
        triton_delta_rule.compute,
        triton_dplr.supports,
        platform="cuda",
        slower=functools.partial(triton_delta_rule.slower, steps_support=hopper_recurrence.supports),
    ),
    "hopper_steps": Implementation(
        functools.partial(_through_dplr, hopper_recurrence.compute), hopper_recurrence.supports, platform="cuda"
    ),
    "tpu_chunks": Implementation(tpu_matrix_states.compute, tpu_matrix_states.supports, platform="tpu"),
    "xla_chunks": Implementation(functools.partial(_through_dplr, _chunked)),
    "xla_steps": Implementation(functools.partial(_through_dplr, _recurrent)),
    "oracle": Implementation(functools.partial(_through_dplr, _recurrent)),
}

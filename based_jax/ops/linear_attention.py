"""Causal linear attention with a normaliser (arXiv 2006.16236, equations 9, 18 to 20).

    S_t = sum_{j<=t} phi(k_j) [v_j, 1]^T          o_t = (phi(q_t)^T S_t)_V / ((phi(q_t)^T S_t)_1 + eps)

The state S is (B, H, E, V+1) fp32; its last column carries the normaliser, which maps with negative features can bring
near zero. What is specific to one feature map is its own operation's: here phi and the scores phi(q).phi(k) are given.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from based_jax import devices
from based_jax.dims import BHEV, BHK, BHV, BTHK, BTHV, SegmentIds
from based_jax.errors import UserError
from based_jax.ops import scan, segments, sequence
from based_jax.ops.arguments import checked
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.dispatch import Implementation, dispatch, target_device_kind
from based_jax.ops.precision import EXACT, einsum, product_policy

CHUNK_TOKENS = 128
NORMALISER_EPS = 1e-12


def initial_state(batch: int, heads: int, expanded_dim: int, value_dim: int) -> BHEV:
    """Return the state before the first token."""
    return jnp.zeros((batch, heads, expanded_dim, value_dim + 1), jnp.float32)


def check_state(operation: str, state: BHEV | None, expanded_dim: int, value_dim: int) -> None:
    """Raise UserError for a state of other features or values."""
    sizes = expanded_dim, value_dim + 1
    if state is not None and state.shape[2:] != sizes:
        raise UserError(f"{operation}: state is {state.shape}; of these q and v its last axes, E and V+1, are {sizes}.")


@checked
def linear_attention(
    phi_q: BTHK,
    phi_k: BTHK,
    v: BTHV,
    *,
    state: BHEV | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTHV, BHEV]:
    """Attend with the features of queries and keys (B, T, H, E) over values (B, T, H, V).

    Args:
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "oracle" (every score in fp32), "xla_steps" (token by token), "xla_chunks" (linear in T), "xla_quadratic"
        (one chunk; auto's for short sequences on a GPU) or "auto".

    Returns:
      o in v's dtype, and the state (B, H, E, V+1) after the last token, fp32.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    check_state("linear_attention", state, phi_q.shape[-1], v.shape[-1])
    call = LinearAttentionCall(phi_q, phi_k, v, state, segment_ids)
    return dispatch("linear_attention", IMPLEMENTATIONS, impl, call, cut(_same))


@checked
@jax.named_scope("linear_attention_step")
def linear_attention_step(phi_q: BHK, phi_k: BHK, v: BHV, state: BHEV) -> tuple[BHV, BHEV]:
    """Return one token's output and the state after it."""
    check_state("linear_attention_step", state, phi_q.shape[-1], v.shape[-1])
    state = state + phi_k.astype(jnp.float32)[..., :, None] * with_ones(v)[..., None, :]
    sums = jnp.einsum("BHE,BHEV->BHV", phi_q.astype(jnp.float32), state, precision=EXACT)
    return normalise(sums).astype(v.dtype), state


@checked
@jax.named_scope("encoder_state")
def encoder_state(phi_k: BTHK, v: BTHV, mask: Shaped[Array, "B T"]) -> BHEV:
    """Return the state that tokens under a mask (B, T) of 0 and 1 leave, in no order."""
    written = with_ones(v) * mask[:, :, None, None]
    return jnp.einsum("BTHE,BTHV->BHEV", phi_k.astype(jnp.float32), written, precision=EXACT)


def oracle(call: LinearAttentionCall, *, features: Callable, scores: Callable) -> tuple[BTHV, BHEV]:
    """Compute every score of the sequence in fp32."""
    q, k, v, state, segment_ids = call
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    visible = segments.same_document(ids, ids) & jnp.tri(q.shape[1], dtype=bool)[None]
    p = jnp.where(visible[:, None], scores(q, k, EXACT), 0.0)
    sums = jnp.einsum("BHTS,BSHV->BTHV", p, with_ones(v), precision=EXACT)
    phi_q, phi_k = features(q), features(k)
    first, last, present = segments.first_id(ids), segments.last_id(ids), ids != 0
    before = _empty(call, features) if state is None else state
    continues = (ids == first[:, None]) & present
    read = jnp.einsum("BTHE,BHEV->BTHV", phi_q.astype(jnp.float32), before, precision=EXACT)
    sums = sums + jnp.where(continues[:, :, None, None], read, 0.0)
    kept = jnp.where(((last == first) | (last == 0))[:, None, None, None], before, 0.0)
    after = kept + encoder_state(phi_k, v, (ids == last[:, None]) & present)
    return normalise(sums).astype(v.dtype), after


def recurrent(call: LinearAttentionCall, *, features: Callable) -> tuple[BTHV, BHEV]:
    """Run `linear_attention_step` over the tokens."""

    def step(token, state):
        return linear_attention_step(features(token.q), features(token.k), token.v, state)

    return scan.over_tokens(step, call.tokens, _empty(call, features), call.state, call.segment_ids)


def chunked(
    call: LinearAttentionCall, *, features: Callable, scores: Callable, length: int | None = CHUNK_TOKENS
) -> tuple[BTHV, BHEV]:
    """Quadratic inside chunks of `length` tokens, through the state between them; features exist for one at a time.

    With a `length` of None the sequence is one chunk.
    """

    def chunk(tokens, state: BHEV, span: scan.Span):
        q, k, v = tokens.q, tokens.k, tokens.v
        dtype, precision = product_policy(v.dtype)
        p = jnp.where(span.visible[:, None], scores(q.astype(dtype), k.astype(dtype), precision, dtype), 0)
        v1 = with_ones(v).astype(dtype)
        far = None
        if not span.fresh:
            phi_q = features(q) * span.reads[:, :, None, None]
            far = einsum("BTHE,BHEV->BTHV", phi_q.astype(dtype), state.astype(dtype), precision)
        o = _mean(p, v.astype(dtype), far, precision).astype(v.dtype)
        phi_k = features(k) * span.writes[:, :, None, None]
        kept = jnp.where(span.keeps[:, None, None, None], state, 0.0)
        return o, kept + einsum("BTHE,BTHV->BHEV", phi_k.astype(dtype), v1, precision)

    length = call.q.shape[1] if length is None else length
    return scan.over_chunks(chunk, call.tokens, _empty(call, features), call.state, call.segment_ids, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mean(p: Float[Array, "B H T S"], v: BTHV, far: Float[Array, "B T H V+1"] | None, precision) -> BTHV:
    """Return p [v, 1] + far, its first V channels over the last one, in v's dtype; all products are of that dtype.

    A product with V + 1 columns would leave cuBLAS's fast paths, which want multiples of 8 in bf16. In the gradient
    dp_ts = (do_t.v_s - do_t.o_t) / z_t, z the last channel, large terms cancel where values have a mean: it is fp32.
    """
    return _mean_forward(p, v, far, precision)[0]


def _mean_forward(p, v, far, precision):
    sums = einsum("BHTS,BSHV->BTHV", p, v, precision)
    z = jnp.sum(p, -1, dtype=jnp.float32).swapaxes(1, 2)
    if far is not None:
        sums, z = sums + far[..., :-1], z + far[..., -1]
    z = z + NORMALISER_EPS
    o = sums / z[..., None]
    return o.astype(v.dtype), (p, v, o, z, None if far is None else ())


def _mean_backward(precision, saved, grad):
    p, v, o, z, far = saved
    share = grad.astype(jnp.float32) / z[..., None]
    last = -jnp.sum(share * o, -1)
    dp = einsum("BTHV,BSHV->BHTS", grad, v, precision) / _rows(z) + _rows(last)
    dv = einsum("BHTS,BTHV->BSHV", p, share.astype(v.dtype), precision, v.dtype)
    return dp.astype(p.dtype), dv, None if far is None else jnp.concatenate([share, last[..., None]], axis=-1)


_mean.defvjp(_mean_forward, _mean_backward)


def _rows(x: Float[Array, "B T H"]) -> Float[Array, "B H T 1"]:
    return x.swapaxes(1, 2)[..., None]


def with_ones(v: Float[Array, "*B V"]) -> Float[Array, "*B V+1"]:
    """Append the constant channel that carries the normaliser, in fp32."""
    v = v.astype(jnp.float32)
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def normalise(sums: Float[Array, "*B _"]) -> Float[Array, "*B V"]:
    """Divide the value channels by the last one."""
    return sums[..., :-1] / (sums[..., -1:] + NORMALISER_EPS)


def one_chunk_is_slower(call: LinearAttentionCall) -> str | None:
    """Return why several chunks are the faster XLA form, or None."""
    T, most = call.q.shape[1], devices.crossovers(target_device_kind()).linear_attention_one_chunk_tokens
    return None if most >= T else f"T is {T}, above {most}"


def _dot(phi_q: BTHK, phi_k: BTHK, precision, dtype=jnp.float32) -> Float[Array, "B H T S"]:
    return einsum("BTHE,BSHE->BHTS", phi_q, phi_k, precision, dtype)


def _same(phi: Array) -> Array:
    return phi


def cut(features: Callable) -> sequence.Cut:
    """Return how time is cut over devices, of an operation with these features."""
    return sequence.summed(functools.partial(_empty, features=features))


def _empty(call: LinearAttentionCall, features: Callable) -> BHEV:
    """Return the state before the first token of a call."""
    batch, _, heads, value_dim = call.v.shape
    expanded_dim = features(jnp.zeros_like(call.q[:1, :1])).shape[-1]
    return initial_state(batch, heads, expanded_dim, value_dim)


IMPLEMENTATIONS = {
    "xla_chunks": Implementation(functools.partial(chunked, features=_same, scores=_dot)),
    "xla_quadratic": Implementation(
        functools.partial(chunked, features=_same, scores=_dot, length=None),
        preferred="cuda",
        slower=one_chunk_is_slower,
    ),
    "xla_steps": Implementation(functools.partial(recurrent, features=_same)),
    "oracle": Implementation(functools.partial(oracle, features=_same, scores=_dot)),
}

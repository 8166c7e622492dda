"""Softmax attention of a few tokens that are read on trial, to the S newest tokens up to each (`Mixer.try_tokens`).

The T tokens stand behind those of a cache, a ring in whose slot p % S the newest token of place p stands, and are not
in it: the token at place p sees of the cache the places above p - S, and of the T those up to its own. The cache of a
whole document is such a ring too, which no token has gone round. Both are read apart, o_i with the logarithm L_i of
their weights' sum, and joined (`softmax_chunks.joined`).
"""

from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from based_jax.dims import BSGK, BSGV, BTGK, BTGV, BTHK, BTHV
from based_jax.ops import sharded, softmax_chunks
from based_jax.ops.arguments import checked
from based_jax.ops.decode_calls import AttentionStepCall, AttentionTrialCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.precision import EXACT
from based_jax.ops.softmax_chunks import LOWEST, Read, product
from based_jax.ops.softmax_prefill import attention_prefill
from based_jax.ops.softmax_step import check_groups
from based_jax.ops.triton import attention_step as triton_step

LEAST_ROWS = 64
"""Of a call that is left to Triton: a model's step of four tokens was timed on one H200, over rings of 128 rows."""
Visible = Bool[Array, "#B T S"]


@checked
def attention_trial(
    q: BTHK,
    k: BTGK,
    v: BTGV,
    past_k: BSGK,
    past_v: BSGV,
    length: Int[Array, "B"],
    *,
    is_ring: bool = True,
    head_dim: int | None = None,
    impl: str = "auto",
) -> BTHV:
    """Return what T tokens read of a ring and of each other.

    Args:
      k, v: of the T tokens, of G heads that divide H as in `attention_step`.
      past_k, past_v: the ring.
      length: tokens that each row has had, all of which or the last S are in the ring.
      is_ring: whether they may be more than S; what does not fit then is the caller's matter.
      head_dim: as of `softmax.attention`.
      impl: "prefill" (`attention_prefill`; of no ring), "xla_scores" (all at once), "oracle" (fp32), "triton_splits"
        (as of `attention_step`) or "auto".

    Raises:
      UserError: the keys' heads do not divide the queries', or `impl` is unknown or cannot run this call.
    """
    check_groups(q.shape[2], k.shape[2])
    call = AttentionTrialCall(q, k, v, past_k, past_v, length, is_ring, head_dim)
    return dispatch("attention_trial", ATTENTION_TRIAL, impl, call)


def _visible(call: AttentionTrialCall) -> Visible:
    """Return which slots of the ring each token sees."""
    S, T = call.past_k.shape[1], call.q.shape[1]
    slot, length = jnp.arange(S)[None], call.length[:, None]
    age = (length - 1 - slot) % S  # 0 of the newest
    return (slot < length)[:, None] & (age[:, None] + jnp.arange(T)[None, :, None] < S - 1)


def _own_visible(call: AttentionTrialCall) -> Visible:
    """Return which of the tokens each of them sees: itself and those before it, S at most."""
    back = jnp.arange(call.q.shape[1])[:, None] - jnp.arange(call.q.shape[1])[None]
    return ((back >= 0) & (back < call.past_k.shape[1]))[None]


def _oracle(call: AttentionTrialCall) -> BTHV:
    """Score every pair at once in fp32, keys repeated for their queries."""
    repeats, T = call.q.shape[2] // call.k.shape[2], call.q.shape[1]
    q = call.q.astype(jnp.float32)
    k, v = (
        jnp.repeat(jnp.concatenate(both, axis=1).astype(jnp.float32), repeats, axis=2)
        for both in ((call.past_k, call.k), (call.past_v, call.v))
    )
    visible = jnp.concatenate([_visible(call), jnp.broadcast_to(_own_visible(call), (len(q), T, T))], axis=2)
    s = jnp.einsum("BTHK,BSHK->BHTS", q, k, precision=EXACT) / call.root
    p = jax.nn.softmax(s, axis=-1, where=visible[:, None])
    return jnp.einsum("BHTS,BSHV->BTHV", p, v, precision=EXACT).astype(call.v.dtype)


def _read(call: AttentionTrialCall, k: Any, v: Any, visible: Visible) -> Read:
    """Read keys and values (B, S, G, .), which serve as many queries each as their heads divide H."""
    q = einops.rearrange(call.q, "B T (G R) K -> B T G R K", G=k.shape[2])
    there = visible[:, None, None]
    s = jnp.where(there, product("BTGRK,BSGK->BGRTS", q, k) / call.root, LOWEST)
    seen, logarithm = there.any(axis=-1), jax.nn.logsumexp(s, axis=-1)
    p = jnp.where(there, jnp.exp(s - logarithm[..., None]), 0.0)
    o = einops.rearrange(product("BGRTS,BSGV->BTGRV", p, v), "B T G R V -> B T (G R) V")
    return o, einops.rearrange(jnp.where(seen, logarithm, LOWEST), "B G R T -> B (G R) T")


def _joined(call: AttentionTrialCall, past: Read) -> BTHV:
    """Return what is read of the ring and of the tokens themselves."""
    own = _read(call, call.k, call.v, _own_visible(call))
    return softmax_chunks.joined(own, past)[0].astype(call.v.dtype)


def _as_prefill(call: AttentionTrialCall) -> BTHV:
    """Read a cache that no token has gone round as a prefill does."""
    return attention_prefill(*call[:6], head_dim=call.head_dim)


def _is_no_ring(call: AttentionTrialCall) -> str | None:
    return "the cache must hold all tokens, and is a ring" if call.is_ring else None


def _scores(call: AttentionTrialCall) -> BTHV:
    """Read the ring with all scores at once."""
    return _joined(call, _read(call, call.past_k, call.past_v, _visible(call)))


def _by_triton(call: AttentionTrialCall) -> BTHV:
    """Read the ring by the kernel of one token, whose products have room for the queries of several."""
    T = call.q.shape[1]
    o, logarithm = triton_step.read_ring(_step_call(call), T)
    o = einops.rearrange(o, "B (H T) V -> B T H V", T=T)
    return _joined(call, (o, einops.rearrange(logarithm, "B (H T) -> B H T", T=T)))


def _step_call(call: AttentionTrialCall) -> AttentionStepCall:
    """Return the call of one token with the queries of all, those of a head beside each other."""
    q = einops.rearrange(call.q, "B T H K -> B (H T) K")
    return AttentionStepCall(q, call.past_k, call.past_v, call.length, call.head_dim)


def _slower(call: AttentionTrialCall) -> str | None:
    """Return why XLA's form is faster, or None."""
    if not call.is_ring:
        return "it was timed over rings alone"
    few = len(call.q) < LEAST_ROWS
    return f"it was timed with 128 rows, and there are {len(call.q)}" if few else triton_step.slower(_step_call(call))


def _per_device(compute):
    """Return an implementation that each device runs for its rows and heads."""
    tokens, rows = ("batch", None, "heads"), ("batch",)

    def on_devices(call: AttentionTrialCall) -> BTHV:
        def on_device(*arrays: Array) -> BTHV:
            q, k, v, past_k, past_v, length = sharded.vary_alike(*arrays)
            return compute(AttentionTrialCall(q, k, v, past_k, past_v, length, call.is_ring, call.head_dim))

        return sharded.per_shard(on_device, call[:6], (*[tokens] * 5, rows), [tokens])

    return on_devices


ATTENTION_TRIAL = {
    "triton_splits": Implementation(
        _per_device(_by_triton),
        lambda call: triton_step.supports(_step_call(call)),
        platform="cuda",
        slower=_slower,
    ),
    "prefill": Implementation(_as_prefill, _is_no_ring),
    "xla_scores": Implementation(_per_device(_scores)),
    "oracle": Implementation(_oracle),
}

"""Softmax attention of one token over a cache, of which only what a row has is read.

    o = sum_{s < length} softmax_s(q.k_s / sqrt(K)) v_s

Keys and values stay as they lie: each serves its group of queries without being repeated.
"""

import functools

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from based_jax.dims import BHK, BHV, BSGK, BSGV
from based_jax.errors import UserError
from based_jax.ops import sharded, softmax
from based_jax.ops.arguments import checked
from based_jax.ops.calls import AttentionCall
from based_jax.ops.decode_calls import AttentionStepCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import attention_step as hopper_step
from based_jax.ops.triton import attention_step as triton_step

BLOCK_TOKENS = 1024
"""Keys that XLA meets together: of a shorter cache all."""
LOWEST = float(jnp.finfo(jnp.float32).min)

Scores = Float[Array, "B S G R"]


@checked
def attention_step(
    q: BHK, k: BSGK, v: BSGV, length: Int[Array, "B"], *, head_dim: int | None = None, impl: str = "auto"
) -> BHV:
    """Return one query's output over the first `length` of the cached keys, zero where it is 0.

    Args:
      k, v: of G heads, which divides H: head g serves queries g H/G to (g+1) H/G - 1.
      length: keys that each row has, up to S.
      head_dim: as of `softmax.attention`.
      impl: "oracle" (every score at once, fp32), "xla_blocks" (as many blocks as the longest row has),
        "hopper_rows" (Mosaic GPU, bf16; a row's keys walked over by one block for 16 heads, which all have their own
        keys), "triton_splits" (GPU, bf16 or fp16; the keys of each row split over programs), "cudnn_flash" (the same,
        not split) or "auto".

    Raises:
      UserError: the keys' heads do not divide the queries', or `impl` is unknown or cannot run this call.
    """
    check_groups(q.shape[1], k.shape[2])
    return dispatch("attention_step", ATTENTION_STEP, impl, AttentionStepCall(q, k, v, length, head_dim))


@checked
def attention_step_weights(
    q: BHK, k: BSGK, v: BSGV, length: Int[Array, "B"], *, head_dim: int | None = None, impl: str = "auto"
) -> tuple[BHV, Float[Array, "B S G"]]:
    """Return what `attention_step` and `attention_weights` do of the same call.

    Args:
      impl: "xla_blocks", "triton_splits" (as of `attention_step`; keys are read once for both; what it returns has been
        checked on no GPU, so not auto's), "oracle" or "auto".
    """
    check_groups(q.shape[1], k.shape[2])
    call = AttentionStepCall(q, k, v, length, head_dim)
    return dispatch("attention_step_weights", ATTENTION_STEP_WEIGHTS, impl, call)


@checked
@jax.named_scope("attention_weights")
def attention_weights(
    q: BHK, k: BSGK, length: Int[Array, "B"], *, head_dim: int | None = None
) -> Float[Array, "B S G"]:
    """Return what a query's softmax gives to each cached key, the mean over those that share it; as `attention_step`.

    Raises:
      UserError: the keys' heads do not divide the queries'.
    """
    check_groups(q.shape[1], k.shape[2])
    call = AttentionStepCall(q, k, k, length, head_dim)
    s = jnp.sum(_by_group(call) * k[:, :, :, None].astype(jnp.float32), axis=-1)
    there = jnp.arange(k.shape[1])[None] < length[:, None]
    return jax.nn.softmax(s, axis=1, where=there[..., None, None]).mean(axis=3)


def check_groups(heads: int, groups: int) -> None:
    """Raise UserError where the heads of keys and values do not divide those of queries."""
    if heads % groups:
        raise UserError(f"Keys and values have {groups} heads; these divide the {heads} of the queries.")


OUTPUT, CACHED = ("batch", "heads"), ("batch", None, "heads")


def per_device(compute, results=(OUTPUT,)):
    """Return an implementation of `AttentionStepCall` that each device runs for its rows and heads."""
    names = OUTPUT, CACHED, CACHED, ("batch",)

    @functools.wraps(compute)
    def on_devices(call: AttentionStepCall):
        def on_device(*arrays: Array):
            q, k, v, length = sharded.vary_alike(*arrays)
            return compute(AttentionStepCall(q, k, v, length, call.head_dim))

        return sharded.per_shard(on_device, call[:4], names, results)

    return on_devices


def _oracle(call: AttentionStepCall) -> BHV:
    """Score every key of the cache, repeated for its queries, in fp32."""
    repeats = call.q.shape[1] // call.k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), repeats, axis=2) for x in (call.k, call.v))
    highest = lax.Precision.HIGHEST
    s = jnp.einsum("BHK,BSHK->BHS", call.q.astype(jnp.float32), k, precision=highest) / call.root
    there = jnp.arange(k.shape[1])[None] < call.length[:, None]
    p = jax.nn.softmax(s, axis=-1, where=there[:, None])
    return jnp.einsum("BHS,BSHV->BHV", p, v, precision=highest).astype(call.v.dtype)


@per_device
def _blocks(call: AttentionStepCall) -> BHV:
    """Meet one block of keys after another, with the largest score, the sum of exponentials and that of values."""
    S, size = call.k.shape[1], min(BLOCK_TOKENS, call.k.shape[1])
    q = _by_group(call)

    def meet(i, sums):
        start = jnp.minimum(i * size, S - size)  # the last block reaches back where S has no whole number of them
        k, v = (lax.dynamic_slice_in_dim(x, start, size, axis=1).astype(jnp.float32) for x in (call.k, call.v))
        place = start + jnp.arange(size)[None]
        there = (place >= i * size) & (place < call.length[:, None])
        return _met(sums, jnp.sum(q * k[:, :, :, None], axis=-1), there, v)

    B, _, G, R, _ = q.shape
    none = jnp.full((B, G, R), LOWEST), jnp.zeros((B, G, R)), jnp.zeros((B, G, R, call.v.shape[3]))
    sums = tuple(sharded.vary_alike(*none, like=call[:4]))
    _, total, o = meet(0, sums) if size == S else lax.fori_loop(0, -(-jnp.max(call.length) // size), meet, sums)
    o = o / jnp.where(total > 0, total, 1.0)[..., None]
    return einops.rearrange(o, "B G R V -> B (G R) V").astype(call.v.dtype)


def _by_group(call: AttentionStepCall) -> Float[Array, "B 1 G R K"]:
    """Return queries beside the keys that they share, over what scores are divided by."""
    return einops.rearrange(call.q, "B (G R) K -> B 1 G R K", G=call.k.shape[2]).astype(jnp.float32) / call.root


def _met(sums, s: Scores, there: Bool[Array, "B S"], v: BSGV):
    """Return the sums after a block's scores and values.

    They are products and sums, not matrix products: for one query these would want a copy of the keys.
    """
    top, total, o = sums
    s = jnp.where(there[..., None, None], s, LOWEST)
    higher = jnp.maximum(top, s.max(axis=1))
    p = jnp.where(there[..., None, None], jnp.exp(s - higher[:, None]), 0.0)
    factor = jnp.exp(top - higher)
    return higher, factor * total + p.sum(axis=1), factor[..., None] * o + jnp.sum(p[..., None] * v[:, :, :, None], 1)


def _with_weights(compute):
    """Return an implementation that reads the keys again for their weights."""

    def both(call: AttentionStepCall) -> tuple[BHV, Float[Array, "B S G"]]:
        return compute(call), attention_weights(call.q, call.k, call.length, head_dim=call.head_dim)

    return both


def _cudnn(call: AttentionStepCall) -> BHV:
    """Attention of one query with real lengths."""
    q, k, v = (sharded.fill(x, {3: softmax.CUDNN_HEAD_MULTIPLE}) for x in (call.q[:, None], call.k, call.v))
    lengths = jnp.maximum(call.length, 1)
    o = jax.nn.dot_product_attention(
        q, k, v, scale=1 / call.root, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return jnp.where(call.length[:, None, None] > 0, o[:, 0, :, : call.v.shape[3]], 0)


def _cudnn_supports(call: AttentionStepCall) -> str | None:
    return softmax.cudnn_supports(AttentionCall(call.q[:, None], call.k, call.v, 1))


ATTENTION_STEP = {
    "hopper_rows": Implementation(
        per_device(hopper_step.compute), hopper_step.supports, platform="cuda", slower=hopper_step.slower
    ),
    "triton_splits": Implementation(
        per_device(triton_step.compute), triton_step.supports, platform="cuda", slower=triton_step.slower
    ),
    "cudnn_flash": Implementation(_cudnn, _cudnn_supports, platform="cuda"),
    "xla_blocks": Implementation(_blocks),
    "oracle": Implementation(_oracle),
}
ATTENTION_STEP_WEIGHTS = {
    "triton_splits": Implementation(
        per_device(triton_step.compute_with_weights, (OUTPUT, CACHED)),
        triton_step.supports,
        platform="cuda",
        slower=triton_step.slower,
    ),
    "xla_blocks": Implementation(_with_weights(_blocks)),
    "oracle": Implementation(_with_weights(_oracle)),
}

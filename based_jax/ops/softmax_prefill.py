"""Softmax attention of a sequence's next tokens to those of a cache and to each other.

Of an empty cache it is `softmax.attention`. Else queries read the cached keys and their own chunk apart, o_i with the
logarithm L_i of their weights' sum, and both are joined (`softmax_chunks.joined`).
"""

from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from based_jax.dims import BSGK, BSGV, BTGK, BTGV, BTHK, BTHV, SegmentIds
from based_jax.ops import segments, sharded, softmax, softmax_chunks
from based_jax.ops.arguments import checked
from based_jax.ops.decode_calls import AttentionPrefillCall
from based_jax.ops.dispatch import Implementation, beside, dispatch
from based_jax.ops.softmax_chunks import CHUNK_TOKENS, LOWEST, Read, product
from based_jax.ops.softmax_step import check_groups


@checked
def attention_prefill(
    q: BTHK,
    k: BTGK,
    v: BTGV,
    past_k: BSGK,
    past_v: BSGV,
    length: Int[Array, "B"],
    *,
    segment_ids: SegmentIds | None = None,
    head_dim: int | None = None,
    impl: str = "auto",
) -> BTHV:
    """Causal softmax attention of T tokens that go on after a cache; temporaries are linear in T.

    Args:
      k, v: of the T tokens, of G heads that divide H as in `attention_step`.
      past_k, past_v: the cache; only as many blocks as the longest row has are read.
      length: cached tokens of each row's first document, up to S.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      head_dim: as of `softmax.attention`.
      impl: as of `softmax.attention`, which runs where all rows are empty; elsewhere its backend's form: "xla_chunks",
        "cudnn_flash" (GPU, bf16 or fp16, no packing), "oracle" or "auto".

    Raises:
      UserError: the keys' heads do not divide the queries', or `impl` is unknown or cannot run this call.
    """
    check_groups(q.shape[2], k.shape[2])
    call = AttentionPrefillCall(q, k, v, past_k, past_v, length, segment_ids, head_dim)

    def begin() -> BTHV:
        keys, values = _for_each_query(call)
        return softmax.attention(q, keys, values, segment_ids=segment_ids, head_dim=head_dim, impl=impl)

    def go_on() -> BTHV:
        return dispatch("attention_prefill", ATTENTION_PREFILL, beside(impl, ATTENTION_PREFILL), call)

    return lax.cond(jnp.any(length > 0), go_on, begin)


def _for_each_query(call: AttentionPrefillCall) -> tuple[BTHK, BTHV]:
    """Return keys and values of the tokens repeated for the queries that each of them serves."""
    repeats = call.q.shape[2] // call.k.shape[2]
    return jnp.repeat(call.k, repeats, axis=2), jnp.repeat(call.v, repeats, axis=2)


def _numbers(call: AttentionPrefillCall) -> Int[Array, "B T"]:
    return jnp.ones(call.q.shape[:2], jnp.int32) if call.segment_ids is None else call.segment_ids


def _oracle(call: AttentionPrefillCall) -> BTHV:
    """Score every pair in fp32, keys repeated for their queries."""
    keys, values = _for_each_query(call._replace(k=call.past_k, v=call.past_v))
    k, v = (jnp.concatenate(x, axis=1) for x in zip((keys, values), _for_each_query(call), strict=True))
    numbers, S = _numbers(call), call.past_k.shape[1]
    there = (jnp.arange(S)[None] < call.length[:, None]).astype(numbers.dtype)  # of the document with number 1
    same = segments.same_document(numbers, jnp.concatenate([there, numbers], axis=1))
    causal = jnp.tri(call.q.shape[1], k.shape[1], S, dtype=bool)[None]
    q, k, v32 = (x.astype(jnp.float32) for x in (call.q, k, v))
    return softmax.masked_attention(q, k, v32, same & causal, root=call.root).astype(v.dtype)


def _per_device(call: AttentionPrefillCall) -> BTHV:
    """Return what `_chunked` does, each device for its rows and heads."""
    tokens, cached = ("batch", None, "heads"), ("batch", None, "heads")
    names = (tokens,) * 3 + (cached,) * 2 + (("batch",), ("batch",))

    def on_device(*arrays: Any) -> BTHV:
        return _chunked(call._replace(**dict(zip(call._fields, sharded.vary_alike(*arrays), strict=False))))

    return sharded.per_shard(on_device, call[:7], names, [tokens])


def _chunked(call: AttentionPrefillCall) -> BTHV:
    numbers = _numbers(call)
    o, _ = softmax_chunks.joined(_of_own(call, numbers), _of_past(call, numbers))
    return o.astype(call.v.dtype)


def _of_own(call: AttentionPrefillCall, numbers: Int[Array, "B T"]) -> Read:
    """Read the tokens' own keys by chunks."""
    options: dict[str, Any] = {"past": 0, "window": call.q.shape[1], "root": call.root}
    return softmax_chunks.read(call.q, *_for_each_query(call), numbers, numbers, **options)


def _of_past(call: AttentionPrefillCall, numbers: Int[Array, "B T"]) -> Read:
    """Read the cached keys, a chunk of queries after the other; of later documents none."""
    T, size, G = call.q.shape[1], min(CHUNK_TOKENS, call.q.shape[1]), call.k.shape[2]
    q = einops.rearrange(sharded.fill(call.q, {1: size}), "B (N T) (G R) K -> N B T G R K", T=size, G=G)
    o, logarithm = lax.map(lambda q: _of_past_by(call, q), q)
    o = einops.rearrange(o, "N B T G R V -> B (N T) (G R) V")[:, :T]
    logarithm = einops.rearrange(logarithm, "N B G R T -> B (G R) (N T)")[:, :, :T]
    first = (numbers == 1)[:, None]
    return o, jnp.where(first, logarithm, LOWEST)


def _of_past_by(call: AttentionPrefillCall, q: Float[Array, "B T G R K"]):
    """Return the same for a chunk of queries (B, T, G, R, .), by as many blocks of keys as the longest row has."""
    S, size = call.past_k.shape[1], min(CHUNK_TOKENS, call.past_k.shape[1])

    def meet(i, sums):
        top, total, o = sums
        start = jnp.minimum(i * size, S - size)  # the last block reaches back where S has no whole number of them
        k, v = (lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (call.past_k, call.past_v))
        place = start + jnp.arange(size)[None]
        there = ((place >= i * size) & (place < call.length[:, None]))[:, None, None, None]
        s = jnp.where(there, product("BTGRK,BSGK->BGRTS", q, k) / call.root, LOWEST)
        higher = jnp.maximum(top, s.max(axis=-1))
        p = jnp.where(there, jnp.exp(s - higher[..., None]), 0.0)
        factor = jnp.exp(top - higher)
        o = _by_token(factor) * o + product("BGRTS,BSGV->BTGRV", p, v)
        return higher, factor * total + p.sum(axis=-1), o

    B, T, G, R, _ = q.shape
    none = jnp.full((B, G, R, T), LOWEST), jnp.zeros((B, G, R, T)), jnp.zeros((B, T, G, R, call.v.shape[3]))
    sums = tuple(sharded.vary_alike(*none, like=call[:6]))
    top, total, o = lax.fori_loop(0, -(-jnp.max(call.length) // size), meet, sums)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return o / _by_token(total), jnp.where(seen, top + jnp.log(total), LOWEST)


def _by_token(x: Float[Array, "B G R T"]) -> Float[Array, "B T G R 1"]:
    return jnp.moveaxis(x, 3, 1)[..., None]


def _cudnn(call: AttentionPrefillCall) -> BTHV:
    """Read both by cuDNN's kernel, which takes other numbers of keys than of queries."""
    multiples = {3: softmax.CUDNN_HEAD_MULTIPLE}
    q, k, v, past_k, past_v = (sharded.fill(x, multiples) for x in call[:5])
    options: dict[str, Any] = {"scale": 1 / call.root, "return_residual": True, "implementation": "cudnn"}
    own, own_logarithm = jax.nn.dot_product_attention(q, k, v, is_causal=True, **options)
    lengths = jnp.maximum(call.length, 1)  # a row without any is left out below
    past, logarithm = jax.nn.dot_product_attention(q, past_k, past_v, key_value_seq_lengths=lengths, **options)
    logarithm = jnp.where(call.length[:, None, None] > 0, logarithm, LOWEST)
    o, _ = softmax_chunks.joined(*((o, jnp.swapaxes(L, 1, 2)) for o, L in ((own, own_logarithm), (past, logarithm))))
    return o[..., : call.v.shape[3]].astype(call.v.dtype)


ATTENTION_PREFILL = {
    "cudnn_flash": Implementation(_cudnn, softmax.cudnn_supports, platform="cuda"),
    "xla_chunks": Implementation(_per_device),
    "oracle": Implementation(_oracle),
}

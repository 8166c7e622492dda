"""Softmax attention, over the whole past and over a sliding window.

    o_i = sum_j softmax_j(q_i.k_j / sqrt(K)) v_j ,     j in (i - window, i]

The window counts visible keys, the query's own included. Softmax is fp32. A window may have sinks, the first tokens
of each document, which all of its queries see (`ops/softmax_sinks.py`).
"""

import functools
import math
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from based_jax import devices
from based_jax.dims import BSHK, BSHV, BT, BTHK, BTHV, SegmentIds
from based_jax.errors import UserError
from based_jax.ops import segments, sequence, sharded, softmax_chunks, softmax_ring, softmax_sinks
from based_jax.ops.arguments import checked
from based_jax.ops.calls import AttentionCall
from based_jax.ops.decode_calls import AttentionPrefillCall
from based_jax.ops.dispatch import Implementation, dispatch, not_run, target_device_kind, target_platform
from based_jax.ops.hopper import attention as hopper_attention
from based_jax.ops.hopper import window as hopper_window
from based_jax.ops.tpu import attention as tpu_attention
from based_jax.ops.tpu import window as tpu_window
from based_jax.ops.triton import attention as triton_attention

MIN_BAND_TOKENS = 64
MAX_BAND_TOKENS = softmax_chunks.CHUNK_TOKENS
"""Of windows that are cut into bands, whose scores exist at once: longer ones are left to chunks."""
MAX_WINDOW = 2**31 - 1
"""Keys: places are int32."""
CUDNN_TIME_MULTIPLE, CUDNN_HEAD_MULTIPLE = 2, 8
CUDNN_HEAD_DIM, CUDNN_HOPPER_HEAD_DIM = 128, 256
"""The largest on GPUs before Hopper, and on it."""
HOPPER_HEAD_DIMS = range(65, hopper_attention.MAX_TURNS_HEAD_DIM + 1)
"""Heads, filled up to the last, with which our Hopper kernels are faster: cuDNN's tiles have 128 channels.

So it was on one H200 for 24 heads of 80 and 8 x 2,048 tokens; with heads of 64 and 128 cuDNN is faster forward.
"""


@checked
def attention(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    *,
    segment_ids: SegmentIds | None = None,
    head_dim: int | None = None,
    impl: str = "auto",
) -> BTHV:
    """Causal softmax attention over (B, T, H, .) arrays.

    Args:
      head_dim: of queries and keys whose last components are zeros that fill them up (`filled_head_dim`), the number of
        the others; scores are over its root.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "oracle", "xla_quadratic" (every score), "xla_chunks" (memory linear in T), "cudnn_flash" (GPU, bf16 or
        fp16, no packing), "hopper_turns" (heads of at most 80), "hopper_tiles" and "triton_tiles" (the same, with
        packing), "tpu_splash" (TPU, bf16) or "auto". Where tokens lie over devices that cannot share the heads, keys
        go round by chunks, whatever it is.

    Raises:
      UserError: `head_dim` is not one, or `impl` is unknown or cannot run this call.
    """
    if head_dim is not None and not 1 <= head_dim <= q.shape[3]:
        raise UserError(f"head_dim is {head_dim}; it is between 1 and the {q.shape[3]} components of a query.")
    call = AttentionCall(q, k, v, q.shape[1], segment_ids, head_dim)
    return dispatch("attention", ATTENTION, impl, call, softmax_ring.cut)


@checked
def window_attention(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    *,
    window: int,
    sinks: int = 0,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> BTHV:
    """Causal softmax attention to the last `window` keys, the query's own included, in O(T * window).

    Args:
      sinks: how many of the first tokens of its document a query sees besides; few.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "oracle" (T x T), "xla_steps" (token by token), "xla_bands", "xla_chunks" (for long windows),
        "hopper_tiles" (Mosaic GPU kernels; bf16, windows up to 129, some head dims, no sinks), "cudnn_flash" (GPU, bf16
        or fp16, no packing, no sinks), "triton_tiles" (the same, with both), "tpu_tiles" (Mosaic TPU kernels; windows
        up to 129, no sinks), "tpu_splash" (TPU, bf16; for long windows; packing or sinks) or "auto".

    Raises:
      UserError: `window` is below 1 or `sinks` below 0, tokens with sinks lie over several devices, or
        `impl` is unknown or cannot run this call.
    """
    if window < 1:
        raise UserError(f"window is {window}; it counts the keys that a query sees, its own included, so at least 1.")
    if window > MAX_WINDOW:
        raise UserError(f"window is {window}; it is at most {MAX_WINDOW}.")
    if sinks < 0:
        raise UserError(f"sinks is {sinks}; it counts the first tokens that a query sees besides, so at least 0.")
    call = AttentionCall(q, k, v, window, segment_ids, sinks=sinks)
    return dispatch("window_attention", WINDOW_ATTENTION, impl, call, sequence.windowed)


def filled_head_dim(head_dim: int) -> int:
    """Return how many components projections give to heads of a cache: on a GPU those that cuDNN fills them up to."""
    return -(-head_dim // CUDNN_HEAD_MULTIPLE) * CUDNN_HEAD_MULTIPLE if target_platform() == "cuda" else head_dim


def whole_pass_head_dim(head_dim: int) -> int:
    """Return how many components projections give to heads where whole sequences are read, as training does."""
    if target_platform() == "cuda" and devices.is_hopper(target_device_kind()) and head_dim in HOPPER_HEAD_DIMS:
        return HOPPER_HEAD_DIMS[-1]
    return filled_head_dim(head_dim)


@checked
@jax.named_scope("masked_attention")
def masked_attention(q: BTHK, k: BSHK, v: BSHV, visible: Bool[Array, "B T S"], *, root: float | None = None) -> BTHV:
    """Return attention under an explicit mask, by scores over `root` or sqrt(K); a query that sees no key gets zero."""
    s = _scores("BTHK,BSHK->BHTS", q, k, root)
    p = jax.nn.softmax(s, axis=-1, where=visible[:, None])
    return _weigh("BHTS,BSHV->BTHV", p, v)


def _masked_read(q: BTHK, k: BSHK, v: BSHV, visible: Bool[Array, "B T S"], root: float) -> softmax_chunks.Read:
    """Return what queries read under an explicit mask, with the logarithm of their weights' sum."""
    s = jnp.where(visible[:, None], _scores("BTHK,BSHK->BHTS", q, k, root), softmax_chunks.LOWEST)
    logarithm = jax.nn.logsumexp(s, axis=-1)
    p = jnp.where(visible[:, None], jnp.exp(s - logarithm[..., None]), 0.0)
    o = softmax_chunks.product("BHTS,BSHV->BTHV", p, v)
    return o, jnp.where(visible.any(axis=-1)[:, None], logarithm, softmax_chunks.LOWEST)


def _oracle(call: AttentionCall) -> BTHV:
    """Score every pair of the sequence in fp32."""
    time, ids = jnp.arange(call.q.shape[1]), _ids(call)
    i, j = time[:, None], time[None, :]
    near = (j <= i) & (j > i - call.window)
    place = time[None] - softmax_sinks.document_starts(ids)
    first = (j <= i)[None] & (place < call.sinks)[:, None]
    visible = (near[None] | first) & segments.same_document(ids, ids)
    q32, k32, v32 = (x.astype(jnp.float32) for x in (call.q, call.k, call.v))
    return masked_attention(q32, k32, v32, visible, root=call.root).astype(call.v.dtype)


def _dense(call: AttentionCall) -> BTHV:
    """Full attention as XLA fuses it best."""
    q, k, v, ids = call.q, call.k, call.v, _ids(call)
    if call.segment_ids is None and q.shape == v.shape:
        return jax.nn.dot_product_attention(q, k, v, scale=1 / call.root, is_causal=True, implementation="xla")
    causal = jnp.tri(q.shape[1], dtype=bool)[None]
    return masked_attention(q, k, v, causal & segments.same_document(ids, ids), root=call.root)


def _chunked(call: AttentionCall) -> BTHV:
    """Attention by chunks."""
    if call.sinks:
        return softmax_sinks.attention(CHUNKED_WINDOW, call)
    return softmax_chunks.attention(call.q, call.k, call.v, *_numbers(call), call.window, call.root)


def _read_window(call: AttentionCall) -> softmax_chunks.Read:
    """Return what queries read of their windows by chunks, for `softmax_sinks`."""
    return softmax_chunks.read(call.q, call.k, call.v, *_numbers(call), **_cut_options(call))


def _window_gradients(call: AttentionCall, o: BTHV, logarithm: Array, do: BTHV) -> tuple[Array, Array, Array]:
    saved = call.q, call.k, call.v, *_numbers(call), o, logarithm
    return softmax_chunks.read_gradients(saved, do, **_cut_options(call))


def _numbers(call: AttentionCall) -> tuple[BT, BT]:
    """Return those of queries and keys; of one document they are the same for all rows, which makes masks small."""
    ids = _ids(call)[:1] if call.segment_ids is None else call.segment_ids
    return ids, ids


def _cut_options(call: AttentionCall) -> dict[str, Any]:
    return {"past": 0, "window": min(call.window, call.q.shape[1]), "root": call.root}


def _triton(call: AttentionCall) -> BTHV:
    """Windows in Triton kernels, and the sinks beside them."""
    if not call.sinks:
        return triton_attention.compute(call)
    o = sharded.per_device(functools.partial(softmax_sinks.attention, TRITON_WINDOW), call)
    return o if call.segment_ids is None else jnp.where(call.segment_ids[..., None, None] == 0, 0, o)


CHUNKED_WINDOW = softmax_sinks.WindowKernel(_read_window, _window_gradients)
TRITON_WINDOW = softmax_sinks.WindowKernel(triton_attention.read_window, triton_attention.window_gradients)


def _recurrent(call: AttentionCall) -> BTHV:
    """Go from token to token with a buffer of the sinks, and of the last `window` keys and values."""

    def push(buffer, new):
        return jnp.concatenate([buffer[:, 1:], new[:, None]], axis=1)

    def put(first, new, place):
        at = jnp.arange(call.sinks)[None] == place[:, None]
        return jnp.where(at.reshape(*at.shape, *(1,) * (new.ndim - 1)), new[:, None], first)

    def token(buffers, inputs):
        (near, first), (q_BHK, new, place) = buffers, inputs
        near, first = jax.tree.map(push, near, new), jax.tree.map(lambda x, y: put(x, y, place), first, new)
        keys, values, key_ids = (jnp.concatenate(both, axis=1) for both in zip(first, near, strict=True))
        left = jnp.arange(call.sinks)[None] <= (place - call.window)[:, None]  # the sinks that are not in the window
        own = jnp.concatenate([left, jnp.ones(near[2].shape, bool)], axis=1)
        visible = own & (key_ids == key_ids[:, -1:]) & (key_ids != 0)
        return (near, first), masked_attention(q_BHK[:, None], keys, values, visible[:, None])[:, 0]

    kept = call.k, call.v, _ids(call)
    places = jnp.arange(call.q.shape[1])[None] - softmax_sinks.document_starts(kept[2])
    zeros = [jnp.zeros((x.shape[0], n, *x.shape[2:]), x.dtype) for n in (call.window, call.sinks) for x in kept]
    empty = tuple(sharded.vary_alike(*zeros, like=(call.q, *kept)))
    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (call.q, kept, places))
    _, o = jax.lax.scan(token, (empty[:3], empty[3:]), inputs)
    return jnp.moveaxis(o, 0, 1)


def _banded(call: AttentionCall) -> BTHV:
    """Cut time into bands no shorter than the window: a band's queries see keys of their own and the band before."""
    T = call.q.shape[1]
    C = min(T, max(call.window - 1, MIN_BAND_TOKENS))
    q, k, v, ids = (_bands(x, C) for x in (call.q, call.k, call.v, _ids(call)))
    k, v, key_ids = (_with_previous(x) for x in (k, v, ids))

    i, j = jnp.arange(C)[:, None] + C, jnp.arange(2 * C)[None, :]
    near = (j <= i) & (j > i - call.window)
    visible = near[None, None] & segments.same_document(ids, key_ids)
    if call.sinks:
        read = jax.vmap(functools.partial(_masked_read, root=call.root), in_axes=1, out_axes=(1, 2))(q, k, v, visible)
        o, logarithm = (
            einops.rearrange(read[0], "B N C H V -> B (N C) H V"),
            einops.rearrange(read[1], "B H N C -> B H (N C)"),
        )
        o, _ = softmax_chunks.joined((o[:, :T], logarithm[..., :T]), softmax_sinks.read(call))
        return o.astype(call.v.dtype)
    o = jax.vmap(masked_attention, in_axes=1, out_axes=1)(q, k, v, visible)
    return einops.rearrange(o, "B N C H V -> B (N C) H V")[:, :T]


def _ids(call: AttentionCall) -> BT:
    """Return ids, those of one document where there are none."""
    return jnp.ones(call.q.shape[:2], jnp.int32) if call.segment_ids is None else call.segment_ids


def _bands(x: Shaped[Array, "B T ..."], length: int) -> Shaped[Array, "B N C ..."]:
    padding = -x.shape[1] % length
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, length, *x.shape[2:])


def _with_previous(x: Shaped[Array, "B N C ..."]) -> Shaped[Array, "B N 2*C ..."]:
    previous = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    return jnp.concatenate([previous, x], axis=2)


def _scores(spec: str, q: Array, k: Array, root: float | None = None) -> Array:
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    s = jnp.einsum(spec, q, k, precision=precision, preferred_element_type=jnp.float32)
    return s / (root or math.sqrt(q.shape[-1]))


def _weigh(spec: str, p: Array, v: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
    o = jnp.einsum(spec, p.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32)
    return o.astype(v.dtype)


def _cudnn(call: AttentionCall) -> BTHV:
    """Attention of heads filled up with zeros, which change no score and no sum, and of even many tokens."""
    q, k, v = (sharded.fill(x, {1: CUDNN_TIME_MULTIPLE, 3: _cudnn_head_dim(call)}) for x in (call.q, call.k, call.v))
    local = None if call.window >= q.shape[1] else (call.window - 1, 0)
    o = jax.nn.dot_product_attention(
        q, k, v, scale=1 / call.root, is_causal=True, local_window_size=local, implementation="cudnn"
    )
    return o[:, : call.v.shape[1], :, : call.v.shape[3]]


def _cudnn_head_dim(call: AttentionCall | AttentionPrefillCall) -> int:
    """Return the size that queries, keys and values get: lanes of `jax.vmap` need that of all to be the same."""
    return filled_head_dim(max(call.q.shape[-1], call.v.shape[-1]))


def cudnn_supports(call: AttentionCall | AttentionPrefillCall) -> str | None:
    """Return why cuDNN cannot run a call, or None."""
    if call.segment_ids is not None:
        return "packed documents need a mask"
    if isinstance(call, AttentionCall) and call.sinks:
        return f"its windows have no sinks, and {call.sinks} are asked for"
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its inputs are bfloat16 or float16, these are {call.q.dtype}"
    # JAX asks the GPU at hand which one it is: without one it takes it for an older one.
    newer = devices.is_hopper(target_device_kind()) and jax.default_backend() == "gpu"
    largest = CUDNN_HOPPER_HEAD_DIM if newer else CUDNN_HEAD_DIM
    if _cudnn_head_dim(call) > largest:
        return f"its head dims are at most {largest}, these are {call.q.shape[-1]} and {call.v.shape[-1]}"
    return None


def _hopper_turns_are_faster(call: AttentionCall) -> str | None:
    size = max(call.q.shape[3], call.v.shape[3])
    if size not in HOPPER_HEAD_DIMS or not devices.is_hopper(target_device_kind()):
        return None
    return None if hopper_attention.supports(call) else f"Hopper kernels are faster for heads of {size}"


def _scores_are_many(call: AttentionCall) -> str | None:
    most, T = devices.crossovers(target_device_kind()).quadratic_attention_tokens, call.q.shape[1]
    return None if most >= T else f"T is {T}, and with more than {most} not every score is made at once"


def _scores_are_few(call: AttentionCall) -> str | None:
    return None if _scores_are_many(call) else f"T is {call.q.shape[1]}, for which every score is made at once"


def _band_is_short(call: AttentionCall) -> str | None:
    return None if _bands_are_long(call) else f"the window is {call.window} of {call.q.shape[1]} keys: bands are enough"


def _bands_are_long(call: AttentionCall) -> str | None:
    return _scores_are_many(call) if call.window > MAX_BAND_TOKENS else None


def _sinks_not_run(call: AttentionCall) -> str | None:
    """Return why Triton's windows are left to others."""
    return not_run(call) if call.sinks else triton_attention.slower(call)


QKV = "q", "k", "v"

ATTENTION = {
    "cudnn_flash": Implementation(_cudnn, cudnn_supports, platform="cuda", slower=_hopper_turns_are_faster),
    "hopper_turns": Implementation(
        hopper_attention.compute_by_turns, hopper_attention.supports_turns, platform="cuda", specialised=True
    ),
    "hopper_tiles": Implementation(hopper_attention.compute, hopper_attention.supports, platform="cuda"),
    "triton_tiles": Implementation(
        triton_attention.compute, triton_attention.supports, platform="cuda", slower=triton_attention.slower
    ),
    "tpu_splash": Implementation(tpu_attention.compute, tpu_attention.supports, platform="tpu", slower=_scores_are_few),
    "xla_quadratic": Implementation(_dense, slower=_scores_are_many),
    "xla_chunks": Implementation(_chunked),
    "oracle": Implementation(_oracle),
}

WINDOW_ATTENTION = {
    "hopper_tiles": Implementation(hopper_window.compute, hopper_window.supports, platform="cuda"),
    "cudnn_flash": Implementation(_cudnn, cudnn_supports, platform="cuda"),
    "triton_tiles": Implementation(
        _triton,
        triton_attention.supports,
        platform="cuda",
        slower=_sinks_not_run,
        by_place=QKV,
    ),
    "tpu_tiles": Implementation(tpu_window.compute, tpu_window.supports, platform="tpu", by_place=QKV),
    "tpu_splash": Implementation(
        tpu_attention.compute,
        tpu_attention.supports,
        platform="tpu",
        slower=_band_is_short,
        by_place=QKV,
    ),
    "xla_bands": Implementation(_banded, slower=_bands_are_long, by_place=QKV),
    "xla_chunks": Implementation(_chunked, by_place=QKV),
    "xla_steps": Implementation(_recurrent, by_place=QKV),
    "oracle": Implementation(_oracle, by_place=QKV),
}

"""Taylor linear attention through the Mosaic GPU kernels: which calls they take, gradients, and the packed state.

The backward pass saves q, k, v, o, z and what pieces of sequences start from (`taylor_pieces.py`). Kernels:
`pallas_kernels/hopper/taylor*.py`.
"""

import functools
import math
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from based_jax.dims import BHEV, BTHV
from based_jax.ops import sharded
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.hopper import limits
from based_jax.ops.hopper.taylor_pieces import documents, number_of_pieces, running

FEATURE_DIM = 16
PACKED_DIM = 160
VALUE_DIM, COLUMN_MULTIPLE = 64, 16
"""Values of a part of a head, and what the last part is a multiple of."""


def supports(call: LinearAttentionCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v must be bfloat16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] > FEATURE_DIM:
        return f"K must be at most {FEATURE_DIM}, and is {q.shape[3]}"
    if 0 in q.shape:
        return "there must be a token"
    return limits.refusal()


def compute(call: LinearAttentionCall) -> tuple[BTHV, BHEV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return sharded.per_device(_any_widths, call)


def _any_widths(call: LinearAttentionCall) -> tuple[BTHV, BHEV]:
    """Return what `compute` does, of one shard.

    The kernels know K = 16, and V = 64 or a multiple of 16 above: narrower arrays get zeros.
    """
    q, k, v, state, segment_ids = call
    feature_dim, value_dim = q.shape[3], v.shape[3]
    if (feature_dim, value_dim) == (FEATURE_DIM, VALUE_DIM):
        return _attention(*call)
    q = (q.astype(jnp.float32) * math.sqrt(FEATURE_DIM / feature_dim)).astype(q.dtype)
    q, k = (_widen(x, FEATURE_DIM) for x in (q, k))
    v = _widen(v, max(VALUE_DIM, value_dim + -value_dim % COLUMN_MULTIPLE))
    parts = -(-value_dim // VALUE_DIM)
    if state is not None:
        state = _split_values(_widen_features(state, feature_dim), parts)
    o, after = _attention(q, k, v, state, segment_ids)
    return o[..., :value_dim], _narrow_features(_join_values(after, parts, value_dim), feature_dim)


def _widen(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))


def _split_values(state: jax.Array, parts: int) -> jax.Array:
    """Return the state (B, H parts, E, 65) of heads that share the values of one (B, H, E, V+1)."""
    values = einops.rearrange(_widen(state[..., :-1], parts * VALUE_DIM), "B H E (P V) -> B (H P) E V", P=parts)
    return jnp.concatenate([values, jnp.repeat(state[..., -1:], parts, axis=1)], axis=-1)


def _join_values(state: jax.Array, parts: int, value_dim: int) -> jax.Array:
    """Undo `_split_values`; the parts' normalisers are the same."""
    values = einops.rearrange(state[..., :-1], "B (H P) E V -> B H E (P V)", P=parts)[..., :value_dim]
    return jnp.concatenate([values, state[:, ::parts, :, -1:]], axis=-1)


def _widen_features(state: jax.Array, feature_dim: int) -> jax.Array:
    """Return the state of the same keys with zeros up to K = 16, of queries that `compute` has scaled."""
    places, scales = _places_of_features(feature_dim)
    wide = jnp.zeros((*state.shape[:2], len(_tables().columns), state.shape[3]), state.dtype)
    return wide.at[:, :, places].set(state * scales[None, None, :, None])


def _narrow_features(state: jax.Array, feature_dim: int) -> jax.Array:
    """Undo `_widen_features`."""
    places, scales = _places_of_features(feature_dim)
    return state[:, :, places] / scales[None, None, :, None]


def _places_of_features(feature_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the features of `taylor_features` of width K lie among those of width 16, and the factor there."""
    rows, columns = np.tril_indices(feature_dim)
    products = 1 + FEATURE_DIM + rows * (rows + 1) // 2 + columns
    places = np.concatenate([[0], 1 + np.arange(feature_dim), products])
    ratio = feature_dim / FEATURE_DIM
    scales = np.repeat([1.0, ratio**0.25, ratio**0.5], [1, feature_dim, len(products)])
    return places, scales.astype(np.float32)


@jax.custom_vjp
def _attention(q, k, v, state, segment_ids):
    return _forward(q, k, v, state, segment_ids)[0]


def _attention_fwd(q, k, v, state, segment_ids):
    q, k, v, state, segment_ids = jax.tree.map(lambda x: x.value, (q, k, v, state, segment_ids))
    (o, after), z, given = _forward(q, k, v, state, segment_ids)
    return (o, after), (q, k, v, o, z, given, segment_ids, state is not None)


def _forward(q, k, v, state, segment_ids):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import taylor as kernels

    (batch, time), (q, k, v) = v.shape[:2], limits.pad_time(q, k, v)
    cut = _cut(v)
    docs = documents(segment_ids, cut["chunks"])
    packed = {"documents": docs and docs.table}
    sums = functools.partial(sharded.launch, kernels.sums, k, v, **packed)
    starts, total = running(None if state is None else pack_state(state), sums, docs=docs, **cut)
    o, z = sharded.launch(kernels.forward, q, k, v, starts, pieces=cut["pieces"], **packed)
    count = (
        jnp.full((batch, 1), time, jnp.float32)
        if docs is None
        else docs.states.sum(axis=1, keepdims=True, dtype=jnp.float32)
    )
    after = unpack_state(total(), jnp.broadcast_to(count, (batch, cut["heads"])))
    after = after if docs is None else jnp.where(docs.unreadable[..., None, None], jnp.nan, after)
    return (o[:, :time], after), z, starts


def _attention_bwd(saved, cotangents):
    from pallas_kernels.hopper import taylor as kernels
    from pallas_kernels.hopper import taylor_backward as backward

    q, k, v, o, z, starts, segment_ids, from_state = saved
    do, dafter = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    time = v.shape[1]
    do = jnp.zeros_like(v) if do is None else do
    q, k, v, o, do = limits.pad_time(q, k, v, o, do)
    cut = _cut(v)
    docs, back = (documents(segment_ids, cut["chunks"], reverse=reverse) for reverse in (False, True))
    options = {"documents": docs and docs.table, "pieces": cut["pieces"]}
    dq, gz = sharded.launch(backward.query_gradient, q, k, v, o, do, z, starts, **options)
    packed = {"documents": back and back.table}
    sums = functools.partial(sharded.launch, kernels.sums, q, do, z, gz, reverse=True, **packed)
    ends, total = running(None if dafter is None else pack_state(dafter), sums, docs=back, reverse=True, **cut)
    dk, dv = sharded.launch(backward.key_value_gradients, q, k, v, do, z, gz, ends, pieces=cut["pieces"], **packed)
    gradients = *(_sum_parts(x[:, :time], q.shape[2]) for x in (dq, dk)), dv[:, :time]
    if not from_state:
        return *gradients, None, None
    read = gz[..., :time] if back is None else gz[..., :time] * back.states[:, None]
    return *gradients, unpack_state(total(), read.sum(axis=2)), None


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _sum_parts(x: Float[Array, "B T _ K"], heads: int) -> Float[Array, "B T {heads} K"]:
    """Return the sums of (B, T, H parts, K) over the parts of each head."""
    if x.shape[2] == heads:
        return x
    return einops.rearrange(x, "B T (H P) K -> B T H P K", H=heads).astype(jnp.float32).sum(axis=3).astype(x.dtype)


def _cut(v: jax.Array) -> dict[str, Any]:
    """Return the sizes that `running` takes; each part of a head is one."""
    batch, time, heads, value_dim = v.shape
    heads *= -(-value_dim // VALUE_DIM)
    chunks = -(-time // limits.CHUNK_TOKENS)
    return {"batch": batch, "heads": heads, "chunks": chunks, "pieces": number_of_pieces(batch * heads, chunks)}


def pack_state(state: BHEV) -> Float[Array, "BH V _"]:
    """Return the kernels' sums (B H, V, SUMS_COLUMNS) of a state (B, H, 153, V+1); V is 64.

    They are S^T (V, 160) and, beside it, the moments: rows 0 to 15 hold sum k k^T, row 16 sum k, and row 17 begins with
    the number of tokens.
    """
    table = _tables()
    packed = jnp.swapaxes(state[:, :, table.features, :-1] * table.scales[None, None, :, None], 2, 3)
    moments = state[..., -1][..., table.moment_features] * table.moment_scales[None, None]
    moments = jnp.pad(moments, ((0, 0), (0, 0), (0, packed.shape[2] - moments.shape[2]), (0, 0)))
    return jnp.concatenate([packed, moments], axis=3).reshape(-1, *packed.shape[2:-1], PACKED_DIM + FEATURE_DIM)


def unpack_state(sums: Float[Array, "BH V _"], count: Float[Array, "B H"]) -> BHEV:
    """Return the state (B, H, 153, V+1) that `pack_state` packs, with `count` more tokens."""
    table = _tables()
    sums = sums.reshape(*count.shape, *sums.shape[1:])
    columns, (rows, cols) = table.columns, table.moment_places
    values = jnp.swapaxes(sums, 2, 3)[:, :, columns] / table.scales[None, None, columns, None]
    moments = sums[..., rows, PACKED_DIM + cols] / table.moment_scales[None, None, rows, cols]
    return jnp.concatenate([values, moments.at[..., 0].add(count)[..., None]], axis=-1)


class _Tables(NamedTuple):
    """The feature and factor of each packed column and moment; the column and the entry of each feature."""

    features: np.ndarray
    scales: np.ndarray
    moment_features: np.ndarray
    moment_scales: np.ndarray
    columns: np.ndarray
    moment_places: np.ndarray


@functools.cache
def _tables() -> _Tables:
    from pallas_kernels.hopper import taylor_packing as packing

    scale = math.sqrt(FEATURE_DIM)
    rows, cols = np.tril_indices(FEATURE_DIM)
    product = {(m, n): 1 + FEATURE_DIM + i for i, (m, n) in enumerate(zip(rows.tolist(), cols.tolist(), strict=True))}

    def feature(kind: int, m: int, n: int) -> tuple[int, float]:
        if kind == packing.PRODUCT:
            return product[max(m, n), min(m, n)], scale * (math.sqrt(2) if m == n else 1)
        if kind == packing.LINEAR:
            return 1 + m, math.sqrt(scale)
        return 0, float(kind == packing.CONSTANT)

    held = [feature(*column) for column in packing.columns().tolist()]
    features, scales = np.array([e for e, _ in held]), np.array([s for _, s in held], np.float32)
    columns = np.zeros(features.max() + 1, np.int32)
    columns[features[scales > 0]] = np.flatnonzero(scales > 0)

    shape = (FEATURE_DIM + 2, FEATURE_DIM)
    moment_features, moment_scales = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for m in range(FEATURE_DIM):
        for n in range(FEATURE_DIM):
            moment_features[m, n], moment_scales[m, n] = feature(packing.PRODUCT, m, n)
        moment_features[FEATURE_DIM, m], moment_scales[FEATURE_DIM, m] = feature(packing.LINEAR, m, m)
    moment_scales[FEATURE_DIM + 1, 0] = 1
    places = np.array([np.argwhere((moment_features == e) & (moment_scales > 0))[0] for e in range(len(columns))]).T
    return _Tables(features, scales, moment_features, moment_scales, columns, places)

"""Taylor linear attention through the Mosaic GPU kernels: which calls they take, pieces, and the packed state.

A sequence is cut into pieces where batch and heads do not fill the chip: their sums come first, then every piece starts
from what lies before it. The backward pass saves q, k, v, o, z and those starts. Kernels: `pallas_kernels/taylor_*.py`.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from based_jax.dims import BHEV, BTHK, BTHV
from based_jax.ops.dispatch import target_device_kind

HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")
FEATURE_DIM = 16
VALUE_DIM = 64
CHUNK = 64
ROWS = 8
"""Tokens of a copy's smallest tile: other lengths are padded."""
MULTIPROCESSORS = 132
SHORTEST_PIECE = 4
"""Chunks; a shorter piece would cost more to start than it takes."""
HALVES = 2
"""Into which a piece is cut again to be summed: two of those blocks fit on a multiprocessor."""
UNROLLED = 16
"""Pieces whose running sums XLA gets as one expression, hence one kernel."""


def supports(q: BTHK, k: BTHK, v: BTHV, state: BHEV | None, segment_ids) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v must be bfloat16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] > FEATURE_DIM:
        return f"K must be at most {FEATURE_DIM}, and is {q.shape[3]}"
    if segment_ids is not None:
        return "segment_ids must be None"
    if 0 in q.shape:
        return "there must be a token"
    if not HOPPER.search(target_device_kind()):
        return f"the kernels are for Hopper GPUs, and this is {target_device_kind()}"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types):
        return f"a mesh of {mesh.size} devices needs jax.shard_map around the call"
    return None


def attention(q: BTHK, k: BTHK, v: BTHV, state: BHEV | None, segment_ids) -> tuple[BTHV, BHEV]:
    """Return o and the state after the last token.

    The kernels know K = 16 and V = 64. Narrower queries and keys get zeros; wider values become several heads with the
    same queries and keys.
    """
    del segment_ids
    feature_dim, value_dim = q.shape[3], v.shape[3]
    if (feature_dim, value_dim) == (FEATURE_DIM, VALUE_DIM):
        return _attention(q, k, v, state)
    q = (q.astype(jnp.float32) * math.sqrt(FEATURE_DIM / feature_dim)).astype(q.dtype)
    parts = -(-value_dim // VALUE_DIM)
    q, k = (jnp.repeat(_widen(x, FEATURE_DIM), parts, axis=2) for x in (q, k))
    v = _widen(v, parts * VALUE_DIM)
    batch, time, heads, _ = v.shape
    if state is not None:
        state = _split_values(_widen_features(state, feature_dim), parts)
    o, after = _attention(q, k, v.reshape(batch, time, heads * parts, VALUE_DIM), state)
    after = _narrow_features(_join_values(after, parts, value_dim), feature_dim)
    return o.reshape(batch, time, heads, -1)[..., :value_dim], after


def _widen(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))


def _split_values(state: jax.Array, parts: int) -> jax.Array:
    """Return the state (B, H parts, E, 65) of heads that share the values of one (B, H, E, V+1)."""
    batch, heads, features, _ = state.shape
    values = _widen(state[..., :-1], parts * VALUE_DIM).reshape(batch, heads, features, parts, VALUE_DIM)
    sums = jnp.broadcast_to(state[..., None, -1:], (*values.shape[:-1], 1))
    joined = jnp.moveaxis(jnp.concatenate([values, sums], axis=-1), 3, 2)
    return joined.reshape(batch, heads * parts, features, VALUE_DIM + 1)


def _join_values(state: jax.Array, parts: int, value_dim: int) -> jax.Array:
    """Undo `_split_values`; the parts' normalisers are the same."""
    batch, _, features, _ = state.shape
    state = jnp.moveaxis(state.reshape(batch, -1, parts, features, VALUE_DIM + 1), 2, 3)
    values = state[..., :-1].reshape(*state.shape[:3], parts * VALUE_DIM)[..., :value_dim]
    return jnp.concatenate([values, state[..., 0, -1:]], axis=-1)


def _widen_features(state: jax.Array, feature_dim: int) -> jax.Array:
    """Return the state of the same keys with zeros up to K = 16, of queries that `attention` has scaled."""
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
def _attention(q, k, v, state):
    return _forward(q, k, v, state)[0]


def _attention_fwd(q, k, v, state):
    q, k, v, state = jax.tree.map(lambda x: x.value, (q, k, v, state))
    (o, after), z, given = _forward(q, k, v, state)
    return (o, after), (q, k, v, o, z, given, state is not None)


def _forward(q, k, v, state):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels import taylor_hopper as kernels
    from pallas_kernels.taylor_state import COUNT_ROW

    time, (q, k, v) = v.shape[1], _pad(q, k, v)
    pieces = _pieces(v)
    before = None if state is None else pack_state(state)
    starts, total = _running(before, v, functools.partial(_call, kernels.sums, k, v), pieces)
    given = _merge(starts) if state is not None or pieces > 1 else ()
    o, z = _call(kernels.forward, q, k, v, *given, pieces=pieces)
    after, moments = total()
    return (o[:, :time], unpack_state(after, moments.at[:, :, COUNT_ROW, 0].add(time))), z, given


def _attention_bwd(saved, cotangents):
    from pallas_kernels import taylor_hopper as kernels
    from pallas_kernels import taylor_hopper_backward as backward
    from pallas_kernels.taylor_state import COUNT_ROW

    q, k, v, o, z, given, from_state = saved
    do, dafter = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    time = v.shape[1]
    do = jnp.zeros_like(v) if do is None else do
    q, k, v, o, do = _pad(q, k, v, o, do)
    pieces = _pieces(v)
    dq, gz = _call(backward.query_gradient, q, k, v, o, do, z, *given, pieces=pieces)
    after = None if dafter is None else pack_state(dafter)
    ends, total = _running(after, v, functools.partial(_call, kernels.sums, q, do, z, gz), pieces, reverse=True)
    given = _merge(ends) if dafter is not None or pieces > 1 else ()
    dk, dv = _call(backward.key_value_gradients, q, k, v, do, z, gz, *given, pieces=pieces)
    gradients = dq[:, :time], dk[:, :time], dv[:, :time]
    if not from_state:
        return *gradients, None
    before, moments = total()
    return *gradients, unpack_state(before, moments.at[:, :, COUNT_ROW, 0].add(gz.sum(axis=2)))


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _call(kernel: Callable, *arrays: jax.Array, **options) -> list[jax.Array]:
    """Run a kernel; under `jax.shard_map` its results vary over the mesh axes that an argument varies over."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return [vary(x) for x in kernel(*map(vary, arrays), **options)]


def _pad(*arrays: jax.Array) -> list[jax.Array]:
    """Return (B, T, H, .) arrays with zeros after the last token, to a length that copies can take."""
    time = arrays[0].shape[1]
    filler = max(CHUNK, -(-time // ROWS) * ROWS) - time
    return [jnp.pad(x, ((0, 0), (0, filler), (0, 0), (0, 0))) for x in arrays]


def _pieces(v: jax.Array) -> int:
    return number_of_pieces(v.shape[0] * v.shape[2], -(-v.shape[1] // CHUNK))


def _running(first, v: jax.Array, sums: Callable, pieces: int, *, reverse: bool = False):
    """Return what lies before each piece (B, H, pieces, ., .), and a function that returns the sums over everything.

    `first` lies before the first piece, None for nothing; `reverse` goes from the last piece to the first. A piece's
    start is summed, not the difference of two sums: large late keys would leave little of it.
    """
    batch, time, heads, value_dim = v.shape

    def split(pair) -> list[jax.Array]:
        return [x.reshape(batch, heads, -1, *x.shape[1:]) for x in pair]

    if first is None:
        first = pack_state(jnp.zeros((batch, heads, len(_tables().columns), value_dim + 1), jnp.float32))
    starts = [x[:, :, None] for x in first]
    if pieces > 1:
        taken = range(HALVES, HALVES * pieces) if reverse else range(HALVES * (pieces - 1))
        added = split(sums(pieces=HALVES * pieces, taken=taken))
        starts = [_accumulated(start, x, reverse) for start, x in zip(starts, added, strict=True)]

    def total() -> list[jax.Array]:
        # XLA drops this where the caller does not use the state.
        parts = number_of_pieces(batch * heads, -(-time // CHUNK) // pieces)
        rest = range(parts) if reverse else range((pieces - 1) * parts, pieces * parts)
        added = split(sums(pieces=pieces * parts, taken=rest))
        return [start[:, :, 0 if reverse else -1] + x.sum(axis=2) for start, x in zip(starts, added, strict=True)]

    return starts, total


def _accumulated(start: jax.Array, added: jax.Array, reverse: bool) -> jax.Array:
    """Return running sums (B, H, pieces, ., .) from `start` (B, H, 1, ., .) over the half pieces `added`."""
    added = added.reshape(*added.shape[:2], -1, HALVES, *added.shape[3:]).sum(axis=3)
    count = added.shape[2]
    if count > UNROLLED:
        terms = [added, start] if reverse else [start, added]
        return lax.cumsum(jnp.concatenate(terms, axis=2), axis=2, reverse=reverse)
    sums = [start]
    for i in range(count)[:: -1 if reverse else 1]:
        sums.append(sums[-1] + added[:, :, i : i + 1])
    return jnp.concatenate(sums[::-1] if reverse else sums, axis=2)


def _merge(starts) -> list[jax.Array]:
    """Return the kernels' (B H pieces, ., .) of (B, H, pieces, ., .) arrays."""
    return [x.reshape(-1, *x.shape[3:]) for x in starts]


def number_of_pieces(sequences: int, chunks: int) -> int:
    """Return into how many pieces each of `sequences` (batch times heads) is cut so that all multiprocessors work."""
    return max(1, min(MULTIPROCESSORS // sequences, chunks // SHORTEST_PIECE))


def pack_state(state: BHEV) -> tuple[jax.Array, jax.Array]:
    """Return S^T (B, H, V, 160) and the moments (B, H, 64, 16) of a state (B, H, 153, V+1).

    Rows 0 to 15 of the moments hold sum k k^T, row 16 sum k, and row 17 begins with the number of tokens.
    """
    table = _tables()
    packed = jnp.swapaxes(state[:, :, table.features, :-1] * table.scales[None, None, :, None], 2, 3)
    moments = state[..., -1][..., table.moment_features] * table.moment_scales[None, None]
    return packed, jnp.pad(moments, ((0, 0), (0, 0), (0, 64 - moments.shape[2]), (0, 0)))


def unpack_state(packed: jax.Array, moments: jax.Array) -> BHEV:
    """Return the state (B, H, 153, V+1) that `pack_state` packs."""
    table = _tables()
    columns, (rows, cols) = table.columns, table.moment_places
    values = jnp.swapaxes(packed, 2, 3)[:, :, columns] / table.scales[None, None, columns, None]
    sums = moments[..., rows, cols] / table.moment_scales[None, None, rows, cols]
    return jnp.concatenate([values, sums[..., None]], axis=-1)


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
    from pallas_kernels import taylor_packing as packing

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

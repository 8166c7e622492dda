"""Taylor linear attention through the Mosaic GPU kernels: which calls they take, pieces, and the packed state.

A sequence is cut into pieces where batch and heads do not fill the chip: their sums come first, then every piece starts
from what lies before it. The backward pass saves q, k, v, o, z and those starts. Kernels: `pallas_kernels/taylor_*.py`.
"""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def supports(q: BTHK, k: BTHK, v: BTHV, state: BHEV | None, segment_ids) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v must be bfloat16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] != FEATURE_DIM or v.shape[3] != VALUE_DIM:
        return f"K must be {FEATURE_DIM} and V {VALUE_DIM}, and are {q.shape[3]} and {v.shape[3]}"
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
    """Return o and the state after the last token."""
    del segment_ids
    return _attention(q, k, v, state)


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

    (batch, time, heads, _), (q, k, v) = v.shape, _pad(q, k, v)
    chunks, pieces = _cut(v)
    # XLA drops these sums where neither pieces nor the caller need them.
    added = _split(kernels.sums(k, v, pieces=pieces), batch, heads)
    before = pack_state(state) if state is not None else tuple(jnp.zeros_like(x[:, :, 0]) for x in added)
    starts, (after, moments) = _running(before, added)
    tokens = np.arange(pieces) * chunks // pieces * CHUNK
    starts = starts[0], starts[1].at[:, :, :, COUNT_ROW, 0].add(tokens[None, None].astype(np.float32))
    given = _merge(starts) if state is not None or pieces > 1 else ()
    o, z = kernels.forward(q, k, v, *given, pieces=pieces)
    after = unpack_state(after, moments.at[:, :, COUNT_ROW, 0].add(time))
    return (o[:, :time], after), z, given


def _attention_bwd(saved, cotangents):
    from pallas_kernels import taylor_hopper as kernels
    from pallas_kernels import taylor_hopper_backward as backward
    from pallas_kernels.taylor_state import COUNT_ROW

    q, k, v, o, z, given, from_state = saved
    do, dafter = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    batch, time, heads, _ = v.shape
    do = jnp.zeros_like(v) if do is None else do
    q, k, v, o, do = _pad(q, k, v, o, do)
    _, pieces = _cut(v)
    dq, gz = backward.query_gradient(q, k, v, o, do, z, *given, pieces=pieces)
    added = _split(kernels.sums(q, do, z, gz, pieces=pieces), batch, heads)
    after = pack_state(dafter) if dafter is not None else tuple(jnp.zeros_like(x[:, :, 0]) for x in added)
    ends, (before, moments) = _running(after, [x[:, :, ::-1] for x in added])
    given = _merge([x[:, :, ::-1] for x in ends]) if dafter is not None or pieces > 1 else ()
    dk, dv = backward.key_value_gradients(q, k, v, do, z, gz, *given, pieces=pieces)
    gradients = dq[:, :time], dk[:, :time], dv[:, :time]
    if not from_state:
        return *gradients, None
    return *gradients, unpack_state(before, moments.at[:, :, COUNT_ROW, 0].add(gz.sum(axis=2)))


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _pad(*arrays: jax.Array) -> list[jax.Array]:
    """Return (B, T, H, .) arrays with zeros after the last token, to a length that copies can take."""
    time = arrays[0].shape[1]
    filler = max(CHUNK, -(-time // ROWS) * ROWS) - time
    return [jnp.pad(x, ((0, 0), (0, filler), (0, 0), (0, 0))) for x in arrays]


def _cut(v: jax.Array) -> tuple[int, int]:
    """Return the number of chunks and of pieces of the padded v."""
    batch, time, heads, _ = v.shape
    chunks = -(-time // CHUNK)
    return chunks, number_of_pieces(batch * heads, chunks)


def _split(sums, batch: int, heads: int) -> list[jax.Array]:
    """Return the kernels' (B H pieces, ., .) sums as (B, H, pieces, ., .)."""
    return [x.reshape(batch, heads, -1, *x.shape[1:]) for x in sums]


def _merge(sums) -> tuple[jax.Array, ...]:
    """Undo `_split`."""
    return tuple(x.reshape(-1, *x.shape[3:]) for x in sums)


def _running(before, added) -> tuple[tuple, tuple]:
    """Return the sums before each piece, and those after the last.

    A piece's start is summed, not the difference of two sums: large late keys would leave little of it.
    """
    starts = [
        jnp.cumsum(jnp.concatenate([start[:, :, None], x[:, :, :-1]], axis=2), axis=2)
        for start, x in zip(before, added, strict=True)
    ]
    return tuple(starts), tuple(start[:, :, -1] + x[:, :, -1] for start, x in zip(starts, added, strict=True))


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

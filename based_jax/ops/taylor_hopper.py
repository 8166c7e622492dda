"""Taylor linear attention through the Mosaic GPU kernels: which calls they take, pieces, and the packed state.

The backward pass is that of the XLA form, recomputed from q, k, v. Source of the packing: `pallas_kernels/`.
"""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def attention(q: BTHK, k: BTHK, v: BTHV, state, segment_ids, *, reference) -> tuple[BTHV, BHEV]:
    """Return o and the state after the last token; `reference` (q, k, v, state, None) gives the gradients."""
    del segment_ids
    return _attention(reference, q, k, v, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(reference, q, k, v, state):
    del reference
    return _forward(q, k, v, state)


def _attention_fwd(reference, q, k, v, state):
    return _attention(reference, q, k, v, state), (q, k, v, state)


def _attention_bwd(reference, saved, cotangents):
    return jax.vjp(lambda *args: reference(*args, None), *saved)[1](cotangents)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(q, k, v, state):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels import taylor_hopper as kernels

    batch, time, heads, _ = v.shape
    filler = max(CHUNK, -(-time // ROWS) * ROWS) - time
    q, k, v = (jnp.pad(x, ((0, 0), (0, filler), (0, 0), (0, 0))) for x in (q, k, v))
    chunks = -(-v.shape[1] // CHUNK)
    pieces = number_of_pieces(batch * heads, chunks)
    # XLA drops these sums where neither pieces nor the caller need them.
    added = [x.reshape(batch, heads, pieces, *x.shape[1:]) for x in kernels.sums(k, v, pieces=pieces)]
    before = [jnp.zeros_like(x[:, :, 0]) for x in added] if state is None else pack_state(state)
    # What a piece starts from is summed, not the difference of two sums: large late keys would leave little of it.
    starts = [
        jnp.cumsum(jnp.concatenate([start[:, :, None], x[:, :, :-1]], axis=2), axis=2)
        for start, x in zip(before, added, strict=True)
    ]
    given = [x.reshape(-1, *x.shape[3:]) for x in starts] if state is not None or pieces > 1 else []
    o, _ = kernels.forward(q, k, v, *given, pieces=pieces)
    after, gram = (start[:, :, -1] + x[:, :, -1] for start, x in zip(starts, added, strict=True))
    gram = gram.at[..., FEATURE_DIM, FEATURE_DIM].add(time - chunks * CHUNK)
    return o[:, :time], unpack_state(after, gram)


def number_of_pieces(sequences: int, chunks: int) -> int:
    """Return into how many pieces each of `sequences` (batch times heads) is cut so that all multiprocessors work."""
    return max(1, min(MULTIPROCESSORS // sequences, chunks // SHORTEST_PIECE))


def pack_state(state: BHEV) -> tuple[jax.Array, jax.Array]:
    """Return S^T (B, H, V, 160) and the Gram matrix of [k, 1] (B, H, 64, 32) of a state (B, H, 153, V+1)."""
    table = _tables()
    packed = jnp.swapaxes(state[:, :, table.features, :-1] * table.scales[None, None, :, None], 2, 3)
    gram = state[..., -1][..., table.gram_features] * table.gram_scales[None, None]
    size = FEATURE_DIM + 1
    return packed, jnp.pad(gram, ((0, 0), (0, 0), (0, 64 - size), (0, 32 - size)))


def unpack_state(packed: jax.Array, gram: jax.Array) -> BHEV:
    """Return the state (B, H, 153, V+1) that `pack_state` packs."""
    table = _tables()
    columns, (rows, cols) = table.columns, table.gram_places
    values = jnp.swapaxes(packed, 2, 3)[:, :, columns] / table.scales[None, None, columns, None]
    sums = gram[..., rows, cols] / table.gram_scales[None, None, rows, cols]
    return jnp.concatenate([values, sums[..., None]], axis=-1)


class _Tables(NamedTuple):
    """The feature and factor of each packed column and Gram entry; the column and the entry of each feature."""

    features: np.ndarray
    scales: np.ndarray
    gram_features: np.ndarray
    gram_scales: np.ndarray
    columns: np.ndarray
    gram_places: np.ndarray


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

    size = FEATURE_DIM + 1
    gram_features, gram_scales = np.zeros((size, size), np.int32), np.ones((size, size), np.float32)
    for m in range(size):
        for n in range(size):
            kind = packing.PRODUCT if max(m, n) < FEATURE_DIM else packing.LINEAR
            kind = packing.CONSTANT if min(m, n) == FEATURE_DIM else kind
            gram_features[m, n], gram_scales[m, n] = feature(kind, min(m, n), max(m, n))
    places = np.array([np.argwhere(gram_features == e)[0] for e in range(len(columns))]).T
    return _Tables(features, scales, gram_features, gram_scales, columns, places)

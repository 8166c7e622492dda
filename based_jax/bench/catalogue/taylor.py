"""Taylor attention."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from based_jax.bench.catalogue.definitions import first_document, sum_over_pairs, with_ones
from based_jax.bench.catalogue.operation import (
    BF16,
    FORWARD,
    FP32,
    HEAD_DIM,
    PACKED,
    Arrays,
    Case,
    Function,
    Operation,
    by_head,
    fp32,
    queries_keys_values,
    tokens,
)
from based_jax.ops import taylor

DIMS = 16, HEAD_DIM
COUNTED_CHUNK_TOKENS = 64
"""Of a chunk, for the count of products only."""
STATE_TOKENS = 50
"""That an initial state remembers."""


def _arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    (batch, heads, _), (k, v) = case.shape, case.dims
    return queries_keys_values(case) | fp32({"state": (batch, heads, taylor.expanded_dim(k), v + 1)})


def _function(case: Case) -> Function:
    def run(arrays, ids):
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        options = {"state": arrays.get("state"), "segment_ids": ids, "impl": case.impl}
        return dict(zip(("o", "state"), taylor.taylor_attention(q, k, v, **options), strict=True))

    return run


def features(x, concatenate: Callable = jnp.concatenate):
    """Return phi(x): 1, x / K^(1/4), and the products x_m x_n / sqrt(K), m >= n, once each."""
    width = x.shape[-1]
    rows, columns = np.tril_indices(width)
    weights = np.where(rows == columns, math.sqrt(0.5), 1.0) / math.sqrt(width)
    products = x[..., rows] * x[..., columns] * weights.reshape((1,) * (x.ndim - 1) + (-1,))
    return concatenate([0 * x[..., :1] + 1, x / width**0.25, products], axis=-1)


def definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return o_i = sum_j p_ij v_j / sum_j p_ij with p = 1 + s + s^2/2, and the state of the last document.

    `arrays` are q, k (B, T, H, K), v (B, T, H, V) and the first document's state (B, H, E, V+1) before the first token.
    """
    q, k, v, before = (arrays[name] for name in ("q", "k", "v", "state"))
    v1 = with_ones(v)
    first, last, present = first_document(ids), first_document(ids[:, ::-1]), ids != 0

    def weights(s, visible):
        return jnp.where(visible, 1 + s + s * s / 2, 0)

    sums = sum_over_pairs(q, k, v1, ids, weights)
    read = jnp.einsum("bthe,bhev->bthv", features(q), before)
    sums = sums + jnp.where(((ids == first[:, None]) & present)[..., None, None], read, 0)
    o = sums[..., :-1] / jnp.where(present[..., None, None], sums[..., -1:], 1)
    owned = ((ids == last[:, None]) & present)[..., None, None]
    kept = jnp.where((first == last)[:, None, None, None], before, 0)
    return {"o": o, "state": kept + jnp.einsum("bthe,bthv->bhev", features(k) * owned, v1)}


def _state(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Return the state that some tokens leave."""
    (batch, heads, _), (k, v) = case.shape, case.dims
    keys, values = (rng.standard_normal((batch, STATE_TOKENS, heads, width)) for width in (k, v))
    phi, v1 = features(keys, np.concatenate), with_ones(values, np.concatenate)
    return np.einsum("bthe,bthv->bhev", phi, v1).astype(np.float32)


def _cost(case: Case, which: str) -> tuple[float, float]:
    """Count q, k, v, o in bf16 and z in fp32; the state is read and added to once per pass over the sequence."""
    (k, v), visible = case.dims, (COUNTED_CHUNK_TOKENS + 1) / 2
    e, count = taylor.expanded_dim(k), tokens(case)
    size, flops = BF16 * (2 * k + 2 * v) + FP32, 4 * e * v + 2 * visible * (k + v)
    if which != FORWARD:
        read, written = BF16 * (2 * k + 3 * v) + FP32, BF16 * (2 * k + v)
        size, flops = size + read + written, flops + 10 * e * v + 2 * visible * (4 * k + 3 * v)
    return count * size, count * flops


def _cases() -> tuple[Case, ...]:
    make = functools.partial(Case, "taylor_attention", dims=DIMS)
    both: tuple[dict[str, Any], ...] = ({}, PACKED)
    cases = []
    for time in (1, 15, 16, 63, 64, 65):
        quick = time in (1, 65)
        cases += [make((2, 3, time), quick=quick and bool(x), **x) for x in both]
    cases += [make((2, 3, 65), state=True), make((2, 3, 65), documents=True)]
    cases += [make((8, 16, 2048), quick=not x, **x) for x in both]
    cases += [make((2, 4, 2048), values=x, quick=x == "late") for x in ("plain", "late", "large")]
    cases += [make((1, 1, 4097), values=x, **y) for x in ("plain", "late") for y in both]
    cases += [make((1, 2, 2049), quick=bool(x), **x) for x in both]
    cases += [make((1, 2, 2049), state=True), make((1, 2, 2049), documents=True)]
    cases += [make((3, 50, 130), **x) for x in both]
    cases += [make((1, 16, 32768), quick=True), make((2, 4, 32768), **PACKED)]
    for dims in ((8, 64), (16, 112), (16, 128), (8, 112)):
        wide = functools.partial(Case, "taylor_attention", dims=dims)
        cases += [wide((2, 3, 65), quick=dims == (8, 112), **PACKED), wide((1, 2, 2049))]
    return (*cases, *(make((4, 3, 130), through=x, **PACKED, quick=True) for x in ("vmap", "shard_map")))


TAYLOR_ATTENTION = Operation(
    table=taylor.IMPLEMENTATIONS,
    arrays=_arrays,
    function=_function,
    oracle=lambda case: definition,
    cost=_cost,
    kernels={"hopper_chunks": ("taylor_",), "triton_chunks": ("taylor_",)},
    cases=_cases(),
    # 550 tokens are two pieces.
    small_cases=(
        Case("taylor_attention", (1, 2, 130), DIMS),
        Case("taylor_attention", (1, 2, 550), DIMS, **PACKED),
    ),
    timed={"taylor_attention": by_head("taylor_attention", DIMS)},
    factors={"late": {"k": 30, "v": 30}, "large": {"q": 4, "k": 4}},
    state=_state,
    compile_seconds=6.0,
)

"""Softmax attention over a cache: of one token, and of a sequence's next tokens. Neither is differentiated."""

import functools
import math

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.definitions import filled, first_document
from based_jax.bench.catalogue.operation import (
    FORWARD,
    HEAD_DIM,
    Arrays,
    Case,
    Function,
    Operation,
    Shape,
    moved_bytes,
    narrow,
)
from based_jax.ops import softmax_prefill, softmax_step, softmax_trial

TIMED_TRIAL_TOKENS, TIMED_TRIAL_SLOTS = 4, 129
"""Three drafted tokens and the one before them, and a window of `configs/based.py`."""


def _step_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a token's queries and a cache of S tokens, of `dims` (K, V, heads of the keys, S); see `filled`."""
    (batch, heads), (k, v, groups, places) = case.shape, case.dims
    cache = {"k": (batch, places, groups, k), "v": (batch, places, groups, v)}
    return narrow(case, {"q": (batch, heads, k), **cache, "fill": (batch,)})


def _step(case: Case, full: bool = False) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        length = jnp.full(len(q), k.shape[1], jnp.int32) if full else filled(arrays["fill"], k.shape[1])
        return {"o": softmax_step.attention_step(q, k, v, length, impl=case.impl)}

    return run


def _weights(case: Case) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        length = filled(arrays["fill"], k.shape[1])
        o, weights = softmax_step.attention_step_weights(q, k, v, length, impl=case.impl)
        return {"o": o, "weights": weights}

    return run


def weights_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return the same, and the weights of each key, the mean over its queries, 0 of one that a row does not have."""
    q, k = arrays["q"], arrays["k"]
    B, S, G = k.shape[:3]
    which = jnp.broadcast_to(jnp.eye(S, dtype=q.dtype)[None, :, None], (B, S, G, S))
    given = step_definition(arrays | {"v": which}, ids)["o"]  # of values that say beside which key they stand
    of_group = given.reshape(B, G, -1, S).mean(axis=2)
    return step_definition(arrays, ids) | {"weights": jnp.swapaxes(of_group, 1, 2)}


def step_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return one query's softmax attention to the keys that its row has, 0 where it has none."""
    q, k, v, fill = (arrays[name] for name in ("q", "k", "v", "fill"))
    there = jnp.arange(k.shape[1])[None] < filled(fill, k.shape[1])[:, None]
    return {"o": attended(q[:, None], k, v, there[:, None])[:, 0]}


def _prefill_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return tokens and a cache of S others, of `dims` as of `_step_arrays`."""
    (batch, heads, time), (k, v, groups, places) = case.shape, case.dims
    token = {"q": (batch, time, heads, k), "k": (batch, time, groups, k), "v": (batch, time, groups, v)}
    cache = {"past_k": (batch, places, groups, k), "past_v": (batch, places, groups, v)}
    return narrow(case, token | cache | {"fill": (batch,)})


def _prefill(case: Case, full: bool = False) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        q, k, v, past_k, past_v = (arrays[name] for name in ("q", "k", "v", "past_k", "past_v"))
        places = past_k.shape[1]
        length = jnp.full(len(q), places, jnp.int32) if full else filled(arrays["fill"], places)
        attend = functools.partial(softmax_prefill.attention_prefill, segment_ids=ids, impl=case.impl)
        return {"o": attend(q, k, v, past_k, past_v, length)}

    return run


def prefill_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return softmax attention of each token to its document up to itself, of a row's first one to the cache too."""
    q, k, v, past_k, past_v = (arrays[name] for name in ("q", "k", "v", "past_k", "past_v"))
    time, places = q.shape[1], past_k.shape[1]
    cached = jnp.arange(places)[None] < filled(arrays["fill"], places)[:, None]
    owners = jnp.concatenate([jnp.where(cached, first_document(ids)[:, None], 0), ids], axis=1)
    same = (ids[:, :, None] == owners[:, None]) & (ids != 0)[:, :, None]
    keys, values = (jnp.concatenate(pair, axis=1) for pair in ((past_k, k), (past_v, v)))
    return {"o": attended(q, keys, values, same & jnp.tri(time, places + time, places, dtype=bool)[None])}


def _trial(case: Case, full: bool = False) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        q, k, v, past_k, past_v = (arrays[name] for name in ("q", "k", "v", "past_k", "past_v"))
        slots = past_k.shape[1]
        length = jnp.full(len(q), 2 * slots, jnp.int32) if full else _had(arrays["fill"], slots)
        return {"o": softmax_trial.attention_trial(q, k, v, past_k, past_v, length, impl=case.impl)}

    return run


def trial_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return softmax attention of each token to itself and the S - 1 newest before it, of a ring and of its own."""
    q, k, v, past_k, past_v = (arrays[name] for name in ("q", "k", "v", "past_k", "past_v"))
    T, S = q.shape[1], past_k.shape[1]
    slot, count = jnp.arange(S)[None], _had(arrays["fill"], S)[:, None]
    place = jnp.where(slot < count, count - 1 - (count - 1 - slot) % S, -S - T)  # of a slot without a token long ago
    token = count + jnp.arange(T)[None]
    places = jnp.concatenate([place, token], axis=1)
    back = token[:, :, None] - places[:, None]
    keys, values = (jnp.concatenate(pair, axis=1) for pair in ((past_k, k), (past_v, v)))
    return {"o": attended(q, keys, values, (back >= 0) & (back < S))}


def _had(fill: jax.Array, slots: int) -> jax.Array:
    """Return how many tokens rows have had: fewer than the slots, and where these are all filled many times as many."""
    count = filled(fill, slots)
    return jnp.where(count < slots, count, 3 * slots + 5)


def attended(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Return (B, T, H, V), the attention of q (B, T, H, K) to the visible (B, T, N) of k and v (B, N, G, .)."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    s = jnp.einsum("btgrk,bngk->btgrn", grouped, k) / math.sqrt(q.shape[-1])
    s = jnp.where(visible[:, :, None, None], s, -jnp.inf)
    p = jnp.exp(s - jnp.maximum(s.max(axis=-1, keepdims=True), -1e300))
    total = p.sum(axis=-1, keepdims=True)
    o = jnp.einsum("btgrn,bngv->btgrv", p, v) / jnp.where(total > 0, total, 1)
    return o.reshape(*q.shape[:3], -1)


def _step_cases() -> tuple[Case, ...]:
    make = functools.partial(Case, "attention_step")
    split = functools.partial(make, impl="triton_splits")
    return (
        make((3, 16), (64, 64, 16, 300), quick=True),
        make((128, 16), (112, 112, 16, 129)),
        make((5, 32), (16, 16, 32, 3)),
        make((2, 48), (128, 128, 48, 1030)),
        split((3, 4), (64, 64, 4, 300)),
        *(split((5, 6), (72, 72, 6, 1), dtype=dtype) for dtype in ("bfloat16", "float16")),
        *(split((5, 8), (128, 128, 2, 1030), dtype=dtype) for dtype in ("bfloat16", "float16")),
        *(split((5, heads), dims) for heads, dims in ((24, (256, 256, 1, 700)), (4, (70, 70, 2, 2100)))),
        split((1, 24), (72, 72, 24, 16384)),
        split((128, 24), (72, 72, 24, 300)),
    )


def _weights_cases() -> tuple[Case, ...]:
    make = functools.partial(Case, "attention_step_weights", impl="triton_splits")
    return (
        make((3, 4), (64, 64, 4, 300), quick=True),
        make((5, 6), (72, 72, 6, 1), dtype="float16"),
        make((5, 8), (128, 128, 2, 1030)),
        make((16, 24), (72, 72, 24, 512)),
    )


def _timed_step(shape: Shape) -> Case:
    """Return the step of a sequence of T tokens."""
    batch, heads, time = shape
    return Case("attention_step", (batch, heads), (HEAD_DIM, HEAD_DIM, heads, time))


def _timed_prefill(shape: Shape) -> Case:
    """Return that of T tokens behind as many."""
    _, heads, time = shape
    return Case("attention_prefill", shape, (HEAD_DIM, HEAD_DIM, heads, time))


def _timed_trial(shape: Shape) -> Case:
    """Return that of a few tokens of B sequences over full rings, whatever their length."""
    batch, heads, _ = shape
    return Case("attention_trial", (batch, heads, TIMED_TRIAL_TOKENS), (HEAD_DIM, HEAD_DIM, heads, TIMED_TRIAL_SLOTS))


ATTENTION_STEP = Operation(
    table=softmax_step.ATTENTION_STEP,
    arrays=_step_arrays,
    function=_step,
    oracle=lambda case: step_definition,
    # A key meets few queries: their products take no time.
    cost=lambda case, which: (moved_bytes(_step_arrays(case), _step(case.by("xla"))), 0.0),
    kernels={"hopper_rows": ("attention_step",), "triton_splits": ("attention_step",)},
    cases=_step_cases(),
    small_cases=(Case("attention_step", (2, 16), (64, 64, 16, 100)),),
    timed={"attention_step": _timed_step},
    timed_function=functools.partial(_step, full=True),
    passes=(FORWARD,),
)

ATTENTION_PREFILL = Operation(
    table=softmax_prefill.ATTENTION_PREFILL,
    arrays=_prefill_arrays,
    function=_prefill,
    oracle=lambda case: prefill_definition,
    # As `softmax.ATTENTION` no products: they depend on the length.
    cost=lambda case, which: (moved_bytes(_prefill_arrays(case), _prefill(case.by("xla"))), 0.0),
    kernels={},
    cases=(
        Case("attention_prefill", (4, 4, 512), (72, 72, 4, 2100)),
        Case("attention_prefill", (4, 8, 300), (128, 128, 2, 1100)),
        Case("attention_prefill", (3, 4, 65), (64, 64, 4, 130), dtype="float16"),
    ),
    small_cases=(),
    timed={"attention_prefill": _timed_prefill},
    timed_function=functools.partial(_prefill, full=True),
    plain_timed=False,
    passes=(FORWARD,),
)

ATTENTION_STEP_WEIGHTS = Operation(
    table=softmax_step.ATTENTION_STEP_WEIGHTS,
    arrays=_step_arrays,
    function=_weights,
    oracle=lambda case: weights_definition,
    cost=lambda case, which: (moved_bytes(_step_arrays(case), _weights(case.by("xla"))), 0.0),
    kernels={"triton_splits": ("attention_step_scores",)},
    cases=_weights_cases(),
    small_cases=(Case("attention_step_weights", (2, 4), (16, 16, 2, 30)),),
    timed={},
    passes=(FORWARD,),
)

ATTENTION_TRIAL = Operation(
    table=softmax_trial.ATTENTION_TRIAL,
    arrays=_prefill_arrays,
    function=_trial,
    oracle=lambda case: trial_definition,
    cost=lambda case, which: (moved_bytes(_prefill_arrays(case), _trial(case.by("xla"))), 0.0),
    kernels={"triton_splits": ("attention_step",)},
    cases=(
        Case("attention_trial", (5, 16, 4), (112, 112, 16, 129), impl="triton_splits", quick=True),
        Case("attention_trial", (6, 4, 5), (72, 72, 2, 700), impl="triton_splits"),
        Case("attention_trial", (5, 2, 17), (64, 64, 2, 30), impl="triton_splits", dtype="float16"),
    ),
    small_cases=(Case("attention_trial", (2, 2, 3), (16, 16, 2, 30)),),
    timed={"attention_trial": _timed_trial},
    timed_function=functools.partial(_trial, full=True),
    passes=(FORWARD,),
)

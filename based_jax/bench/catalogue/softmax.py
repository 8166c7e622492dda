"""Softmax attention, over the whole past and over a window."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.definitions import sum_over_pairs, with_ones
from based_jax.bench.catalogue.operation import (
    BF16,
    FORWARD,
    FP32,
    HEAD_DIM,
    Arrays,
    Case,
    Definition,
    Function,
    Operation,
    by_head,
    queries_keys_values,
    tokens,
)
from based_jax.ops import softmax

DIMS = HEAD_DIM, HEAD_DIM
WINDOWS = 64, 128
FACTORS = {"late": {"v": 30}, "large": {"q": 2, "k": 2}}


def _function(case: Case, attend: Callable) -> Function:
    def run(arrays, ids):
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        return {"o": attend(q, k, v, segment_ids=ids, impl=case.impl)}

    return run


def _window_function(case: Case) -> Function:
    window = case.window or case.shape[2]
    return _function(case, functools.partial(softmax.window_attention, window=window))


def definition(arrays: Arrays, ids: jax.Array, *, window: int | None) -> Arrays:
    """Return softmax attention to the last `window` keys of the same document, the query's own included."""
    q, k, v = (arrays[name] for name in ("q", "k", "v"))

    def weights(s, visible):
        s = jnp.where(visible, s, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.maximum(s.max(axis=-1, keepdims=True), -1e300))
        return jnp.exp(s - top)

    sums = sum_over_pairs(q, k, with_ones(v), ids, weights, window)
    return {"o": sums[..., :-1] / jnp.where((ids != 0)[..., None, None], sums[..., -1:], 1)}


def _oracle(case: Case) -> Definition:
    return functools.partial(definition, window=case.window)


def _attention_cost(case: Case, which: str) -> tuple[float, float]:
    """Count q, k, v, o in bf16, the logarithms of the sums in fp32, and no products: they depend on the length."""
    forward = 4 * BF16 * case.dims[0] + FP32
    return tokens(case) * (forward if which == FORWARD else forward + 8 * BF16 * case.dims[0] + FP32), 0.0


def _window_cost(case: Case, which: str) -> tuple[float, float]:
    """Count q, k, v, o in bf16; the backward pass computes o and its sums again from what it must read anyway."""
    width, window, count = case.dims[0], case.window or case.shape[2], tokens(case)
    size, flops = count * 4 * BF16 * width, count * 4.0 * width * window
    return (size, flops) if which == FORWARD else (size + count * 7 * BF16 * width, 3.5 * flops)


def _attention_cases() -> tuple[Case, ...]:
    make = functools.partial(Case, "attention", dims=DIMS)
    cases = [make((2, 3, time), documents=x) for time in (1, 65, 1000) for x in (False, True)]
    sizes = ((16, 16), (70, 70), (96, 96), (128, 128), (256, 256), (64, 128))
    cases += [Case("attention", (2, 3, 300), dims, documents=True, quick=dims == (70, 70)) for dims in sizes]
    cases += [make((8, 16, 2048), documents=x, quick=x) for x in (False, True)]
    cases += [make((2, 3, 1000), values=x, documents=True) for x in FACTORS]
    return (*cases, *(make((4, 3, 130), documents=True, through=x) for x in ("vmap", "shard_map")))


def _window_cases() -> tuple[Case, ...]:
    make = functools.partial(Case, "window_attention", dims=DIMS)
    wide = functools.partial(Case, "window_attention", (2, 3, 200), documents=True)
    cases = [make((2, 3, time), window=64, documents=x) for time in (1, 16, 63, 65, 2049) for x in (False, True)]
    for window in (7, 128, 129):
        cases += [make((2, 3, time), window=window, documents=time == 1000) for time in (65, 1000)]
    cases += [make((8, 16, 2048), window=x, quick=x == 64) for x in (64, 128)]
    cases += [wide((112, 112), window=64), wide((128, 128), window=129)]
    cases += [make((1, 2, 32768), window=128, documents=True)]
    cases += [make((2, 3, 1000), window=64, values=x, documents=True, quick=x == "late") for x in ("late", "large")]
    return (*cases, *(make((4, 3, 130), window=64, documents=True, through=x) for x in ("vmap", "shard_map")))


ATTENTION = Operation(
    table=softmax.ATTENTION,
    arrays=queries_keys_values,
    function=functools.partial(_function, attend=softmax.attention),
    oracle=_oracle,
    cost=_attention_cost,
    kernels=dict.fromkeys(("hopper_tiles", "hopper_turns", "triton_tiles"), ("attention_",)),
    cases=_attention_cases(),
    small_cases=tuple(Case("attention", (1, 2, 130), DIMS, documents=x) for x in (False, True)),
    timed={"attention": by_head("attention", DIMS)},
    plain_timed=False,
    factors=FACTORS,
)

WINDOW_ATTENTION = Operation(
    table=softmax.WINDOW_ATTENTION,
    arrays=queries_keys_values,
    function=_window_function,
    oracle=_oracle,
    cost=_window_cost,
    kernels={"hopper_tiles": ("window_",), "triton_tiles": ("attention_",)},
    cases=_window_cases(),
    small_cases=tuple(
        Case("window_attention", (1, 2, 130), DIMS, window=x, documents=x == 129) for x in (WINDOWS[0], 129)
    ),
    timed={f"window_attention_{x}": by_head("window_attention", DIMS, window=x) for x in WINDOWS},
    factors=FACTORS,
    compile_seconds=4.0,
)

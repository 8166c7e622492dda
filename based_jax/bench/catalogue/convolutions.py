"""Convolutions of a few taps: Based's gated one, and the plain one with its bias and SiLU."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.operation import (
    BF16,
    FORWARD,
    PACKED,
    Arrays,
    Case,
    Definition,
    Function,
    Operation,
    Shape,
    bf16,
    by_channel,
    fp32,
    tokens,
)
from based_jax.ops import conv, gated_conv
from based_jax.ops.dispatch import Implementation

WIDE_TAPS = 64
"""H3's of the reference configs."""


def _arrays(case: Case, halves: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return those of a convolution whose x is so many times as wide as y."""
    (batch, channels, time), [taps] = case.shape, case.dims
    wide = {"x": (batch, time, halves * channels), "state": (batch, taps, channels)}
    return bf16(wide) | fp32({"kernel": (taps, channels), "bias": (halves * channels,)})


def _function(case: Case, convolve: Callable) -> Function:
    def run(arrays, ids):
        options = {"bias": arrays["bias"], "state": arrays.get("state"), "segment_ids": ids, "impl": case.impl}
        y, _ = convolve(arrays["x"], arrays["kernel"], **options)
        return {"y": y}

    return run


def gated_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return silu(sum_w kernel_w u_{t-(W-1-w)}) g with [u, g] = x + bias; `state` is the W inputs u before."""
    u, gate = jnp.split(arrays["x"] + arrays["bias"][None, None], 2, axis=-1)
    c = convolved(u, arrays["kernel"], arrays["state"], ids)
    return {"y": jnp.where((ids != 0)[..., None], c * jax.nn.sigmoid(c) * gate, 0)}


def plain_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return silu(sum_w kernel_w x_{t-(W-1-w)} + bias); `state` is the W inputs before."""
    c = convolved(arrays["x"], arrays["kernel"], arrays["state"], ids) + arrays["bias"][None, None]
    return {"y": jnp.where((ids != 0)[..., None], c * jax.nn.sigmoid(c), 0)}


def convolved(u: jax.Array, kernel: jax.Array, state: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the convolution of each row's real tokens, which stand before its padding here."""
    taps, order = len(kernel), jnp.argsort(ids == 0, axis=1, stable=True)
    u, ids = jnp.take_along_axis(u, order[..., None], axis=1), jnp.take_along_axis(ids, order, axis=1)
    inputs = jnp.concatenate([state, u], axis=1)
    owners = jnp.concatenate([jnp.repeat(ids[:, :1], taps, axis=1), ids], axis=1)

    def add(c, tap):
        seen, owner = (jax.lax.dynamic_slice_in_dim(x, tap + 1, u.shape[1], axis=1) for x in (inputs, owners))
        same = (owner == ids) & (ids != 0)
        return c + jnp.where(same[..., None], seen, 0) * kernel[tap][None, None], None

    c, _ = jax.lax.scan(jax.checkpoint(add), jnp.zeros_like(u), jnp.arange(taps))  # which would keep a term of each tap
    return jnp.take_along_axis(c, jnp.argsort(order, axis=1)[..., None], axis=1)


def _cost(case: Case, which: str, halves: int) -> tuple[float, float]:
    """Count x and y forward; backward x, dy and dx."""
    forward = halves + 1
    return tokens(case) * BF16 * (forward if which == FORWARD else forward + 2 * halves + 1), 0.0


def _cases(name: str, usual: int, others: tuple[int, ...]) -> tuple[Case, ...]:
    make = functools.partial(Case, name)
    cases = [make((2, 384, time), (usual,), **x) for time in (1, 15, 65) for x in ({}, PACKED)]
    cases += [make((3, 128, 130), (taps,), **PACKED) for taps in others]
    cases += [make((8, 1024, 2048), (usual,), quick=True), make((2, 2048, 2049), (usual,), **PACKED, quick=True)]
    return (*cases, *(make((4, 256, 130), (usual,), documents=True, through=x) for x in ("vmap", "shard_map")))


def _convolution(
    name: str,
    table: Mapping[str, Implementation],
    convolve: Callable,
    definition: Definition,
    kernels: Mapping[str, tuple[str, ...]],
    *,
    halves: int,
    taps: int,
    other_taps: tuple[int, ...],
    more: tuple[Case, ...] = (),
    timed: Mapping[str, Callable[[Shape], Case]] = MappingProxyType({}),
) -> Operation:
    return Operation(
        table=table,
        arrays=functools.partial(_arrays, halves=halves),
        function=functools.partial(_function, convolve=convolve),
        oracle=lambda case: definition,
        cost=functools.partial(_cost, halves=halves),
        kernels=kernels,
        cases=_cases(name, taps, other_taps) + more,
        small_cases=(Case(name, (1, 256, 130), (3,), documents=True),),
        timed={name: by_channel(name, (taps,)), **timed},
        weights=frozenset({"kernel", "bias"}),
    )


GATED_SHORT_CONV = _convolution(
    "gated_short_conv",
    gated_conv.IMPLEMENTATIONS,
    gated_conv.gated_short_conv,
    gated_definition,
    {"hopper_taps": ("gated_conv",)},
    halves=2,
    taps=3,
    other_taps=(2, 4),
)

SHORT_CONV = _convolution(
    "short_conv",
    conv.IMPLEMENTATIONS,
    functools.partial(conv.short_conv, silu=True),
    plain_definition,
    {"hopper_taps": ("short_conv",), "triton_tiles": ("toeplitz",)},
    halves=1,
    taps=4,
    other_taps=(2, 3),
    more=(
        Case("short_conv", (2, 96, 130), (WIDE_TAPS,), "triton_tiles", **PACKED),
        Case("short_conv", (3, 64, 257), (WIDE_TAPS + 3,), "triton_tiles"),
        Case("short_conv", (4, 256, 2048), (WIDE_TAPS,), "triton_tiles", documents=True, quick=True),
    ),
    timed={"wide_short_conv": by_channel("short_conv", (WIDE_TAPS,))},
)

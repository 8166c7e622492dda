"""Convolutions as long as the sequence: any kernel (Hyena), and the response of a diagonal state space (H3)."""

import functools

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.convolutions import convolved
from based_jax.bench.catalogue.definitions import scan_tokens
from based_jax.bench.catalogue.operation import (
    BF16,
    FORWARD,
    FP32,
    PACKED,
    Arrays,
    Case,
    Function,
    Operation,
    bf16,
    by_channel,
    fp32,
    tokens,
)
from based_jax.ops import diagonal_ssm, long_conv

TIMED_MODES = 32
"""States of a head of what is timed: H3's of the reference configs."""
KERNELS = {"triton_tiles": ("toeplitz",)}


def _long_conv_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    batch, channels, time = case.shape
    return bf16({"u": (batch, time, channels)}) | fp32({"kernel": (time, channels)})


def _long_conv(case: Case) -> Function:
    def run(arrays, ids):
        return {"y": long_conv.long_conv(arrays["u"], arrays["kernel"], segment_ids=ids, impl=case.impl)}

    return run


def long_conv_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return y_t = sum_{s<=t} kernel_{t-s} u_s over the document of t."""
    u, kernel = arrays["u"], arrays["kernel"]
    return {"y": convolved(u, kernel[::-1], jnp.zeros_like(u), ids)}


def _cost(case: Case, which: str, others: int) -> tuple[float, float]:
    """Count inputs and outputs, backward theirs as well, so many other bytes and their gradients, and three FFTs."""
    size, flops = tokens(case) * 2 * BF16 + others, float(tokens(case) * long_conv.fft_flops(case.shape[2]))
    return (size, flops) if which == FORWARD else (size + tokens(case) * 3 * BF16 + 2 * others, 3 * flops)


def _long_conv_cost(case: Case, which: str) -> tuple[float, float]:
    _, channels, time = case.shape
    return _cost(case, which, channels * time * FP32)


def _cases(name: str, dims: tuple[int, ...], options: dict) -> tuple[Case, ...]:
    make = functools.partial(Case, name)
    return (
        *(make((2, 96, time), dims, **x) for time in (1, 15, 65) for x in ({}, options)),
        make((3, 40, 130), dims, **options),
        make((5, 128, 2048), dims, quick=True),
        make((2, 128, 2049), dims, **options, quick=True),
        *(make((4, 64, 130), dims, documents=True, through=x) for x in ("vmap", "shard_map")),
    )


LONG_CONV = Operation(
    table=long_conv.IMPLEMENTATIONS,
    arrays=_long_conv_arrays,
    function=_long_conv,
    oracle=lambda case: long_conv_definition,
    cost=_long_conv_cost,
    kernels=KERNELS,
    cases=_cases("long_conv", (), {"documents": True}),
    small_cases=(Case("long_conv", (1, 64, 130), documents=True),),
    timed={"long_conv": by_channel("long_conv")},
    weights=frozenset({"kernel"}),
    scales={"kernel": 0.1},
)


def modes(arrays: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return log a, b and c (H, N): a of a length below 1 and of any angle."""
    log_a = jax.lax.complex(-0.1 * jax.nn.softplus(arrays["rate"]), arrays["angle"])
    b, c = (jax.lax.complex(arrays[name][..., 0], arrays[name][..., 1]) for name in "bc")
    return log_a, b, c


def _ssm_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    (batch, heads, time), [count] = case.shape, case.dims
    angles, vectors = (
        {"rate": (heads, count), "angle": (heads, count)},
        {"b": (heads, count, 2), "c": (heads, count, 2)},
    )
    return bf16({"u": (batch, time, heads, 1)}) | fp32(angles | vectors | {"state": (batch, heads, 1, count, 2)})


def _ssm(case: Case) -> Function:
    def run(arrays, ids):
        options = {"state": arrays.get("state"), "segment_ids": ids, "impl": case.impl}
        y, state = diagonal_ssm.diagonal_ssm(arrays["u"], *modes(arrays), **options)
        return {"y": y, "state": state}

    return run


def _ssm_without_state(case: Case) -> Function:
    """Return what a training step asks for."""

    def run(arrays, ids):
        return {"y": _ssm(case)(arrays, ids)["y"]}

    return run


def ssm_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return y_t = 2 Re sum_n c_n x_t,n with x_t = a x_{t-1} + b u_t, and the last document's x."""
    log_a, b, c = modes(arrays)
    a = jnp.exp(log_a)[None, :, None]

    def token(state, u):
        x = a * jax.lax.complex(state[..., 0], state[..., 1]) + b[None, :, None] * u[..., None]
        return jnp.stack([x.real, x.imag], axis=-1), 2 * (c[None, :, None] * x).real.sum(axis=-1)

    y, state = scan_tokens(token, arrays["state"], (arrays["u"],), ids)
    return {"y": y, "state": state}


def _ssm_cost(case: Case, which: str) -> tuple[float, float]:
    """Count the modes and the state after."""
    (batch, heads, _), [count] = case.shape, case.dims
    return _cost(case, which, (6 + 2 * batch) * heads * count * FP32)


DIAGONAL_SSM = Operation(
    table=diagonal_ssm.IMPLEMENTATIONS,
    arrays=_ssm_arrays,
    function=_ssm,
    oracle=lambda case: ssm_definition,
    cost=_ssm_cost,
    kernels=KERNELS,
    cases=_cases("diagonal_ssm", (8,), PACKED),
    small_cases=(Case("diagonal_ssm", (1, 64, 130), (8,), documents=True),),
    timed={"diagonal_ssm": by_channel("diagonal_ssm", (TIMED_MODES,))},
    timed_function=_ssm_without_state,
    weights=frozenset({"rate", "angle", "b", "c"}),
)

"""RMS norm and layer norm, alone and behind a residual addition; RMS norm behind a skip and a gate."""

import functools

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.operation import (
    BF16,
    FORWARD,
    FP32,
    Arrays,
    Case,
    Function,
    Operation,
    bf16,
    by_channel,
    fp32,
    tokens,
)
from based_jax.ops import gated_norm, norm


def _arrays(case: Case, names: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    batch, channels, time = case.shape
    wide = fp32({"r": (batch, time, channels)}) | bf16({"y": (batch, time, channels)})
    found = wide | fp32({"scale": (channels,), "bias": (channels,)})
    return {name: found[name] for name in names}


def _function(case: Case) -> Function:
    def run(arrays, ids):
        r, y, scale, bias = (arrays.get(name) for name in ("r", "y", "scale", "bias"))
        options = {"dtype": jnp.bfloat16, "impl": case.impl}
        if bias is None:
            r, x = norm.residual_rms_norm(r, y, scale, **options)
        else:
            r, x = norm.residual_layer_norm(r, y, scale, bias, **options)
        return {"r": r, "x": x}

    return run


def definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return r + y, and it over the root of its mean square, times `scale`; with a `bias` less its mean, plus it."""
    total = arrays["r"] + arrays.get("y", 0)
    bias = arrays["bias"][None, None] if "bias" in arrays else 0
    rows = total - jnp.mean(total, axis=-1, keepdims=True) if "bias" in arrays else total
    root = jnp.sqrt(jnp.mean(rows**2, axis=-1, keepdims=True) + 1e-5)
    return {"r": total, "x": rows / root * arrays["scale"][None, None] + bias}


def _cost(case: Case, which: str, adds: bool) -> tuple[float, float]:
    """Count r and its gradients in fp32, y and the norm and theirs in bf16; the backward pass reads the sum again.

    Without y there is no sum to write.
    """
    forward = FP32 + BF16 + (FP32 + BF16) * adds
    return tokens(case) * (forward if which == FORWARD else forward + 3 * FP32 + BF16 + BF16 * adds), 0.0


def _cases(name: str) -> tuple[Case, ...]:
    shapes = (1, 128, 1024), (1, 384, 1025), (2, 1792, 2049), (1, 4096, 1030), (4, 64, 2050)
    filled = (2, 600, 1025), (2, 1680, 1025)
    make = functools.partial(Case, name)
    return (
        *map(make, shapes + filled),
        make((8, 1024, 2048), quick=True),
        *(make((4, 256, 600), through=x) for x in ("vmap", "shard_map")),
    )


def _norm(name: str, *arrays: str) -> Operation:
    """Return the norm that takes these arrays: RMS norm, or layer norm where there is a bias."""
    adds = "y" in arrays
    return Operation(
        table=norm.IMPLEMENTATIONS,
        arrays=functools.partial(_arrays, names=arrays),
        function=_function,
        oracle=lambda case: definition,
        cost=functools.partial(_cost, adds=adds),
        kernels={"hopper_rows": ("residual_norm",)},
        cases=_cases(name),
        small_cases=(Case(name, (1, 256, 1030)),),
        timed={name: by_channel(name)} if adds else {},
        weights=frozenset({"scale", "bias"} & set(arrays)),
        compile_seconds=1.0,
    )


RESIDUAL_RMS_NORM = _norm("residual_rms_norm", "r", "y", "scale")
RESIDUAL_LAYER_NORM = _norm("residual_layer_norm", "r", "y", "scale", "bias")
RMS_NORM = _norm("rms_norm", "r", "scale")
LAYER_NORM = _norm("layer_norm", "r", "scale", "bias")


def _gated_arrays(case: Case, weights: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    batch, channels, time = case.shape
    wide = dict.fromkeys(("y", "u", "z"), (batch, time, channels))
    return bf16(wide) | fp32(dict.fromkeys(weights, (channels,)))


def _gated_function(case: Case) -> Function:
    def run(arrays, ids):
        operation = gated_norm.gated_rms_norm if "scale" in arrays else gated_norm.gated_skip
        return {"x": operation(**arrays, impl=case.impl)}

    return run


def gated_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return (y + skip u) silu(z), or with a `scale` its RMS norm times it."""
    z = arrays["z"]
    gated = (arrays["y"] + arrays["skip"][None, None] * arrays["u"]) * z / (1 + jnp.exp(-z))
    if "scale" not in arrays:
        return {"x": gated}
    return {"x": gated / jnp.sqrt(jnp.mean(gated**2, axis=-1, keepdims=True) + 1e-5) * arrays["scale"][None, None]}


def _gated_cost(case: Case, which: str) -> tuple[float, float]:
    """Count y, u, z and the result, then the first three again with the result's gradient, and those of y, u and z."""
    return tokens(case) * BF16 * (4 if which == FORWARD else 4 + 7), 0.0


def _gated_cases(name: str) -> tuple[Case, ...]:
    make = functools.partial(Case, name)
    shapes = (1, 128, 1024), (1, 384, 1025), (2, 1792, 2049), (1, 4096, 1030)
    return (
        *map(make, shapes),
        make((8, 4096, 2048), quick=True),
        *(make((4, 256, 600), through=x) for x in ("vmap", "shard_map")),
    )


def _gated(name: str, *weights: str) -> Operation:
    """Return the skip and the gate, with a norm where there is a scale."""
    return Operation(
        table=gated_norm.IMPLEMENTATIONS,
        arrays=functools.partial(_gated_arrays, weights=weights),
        function=_gated_function,
        oracle=lambda case: gated_definition,
        cost=_gated_cost,
        kernels={"hopper_rows": (name.replace("rms_", ""),)},
        cases=_gated_cases(name),
        small_cases=(Case(name, (1, 256, 1030)),),
        timed={name: by_channel(name)},
        weights=frozenset(weights),
        compile_seconds=1.0,
    )


GATED_SKIP = _gated("gated_skip", "skip")
GATED_RMS_NORM = _gated("gated_rms_norm", "skip", "scale")

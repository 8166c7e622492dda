"""Half a layer of a token that is decoded, from the residual stream to what is to be added next. It has no gradient."""

import functools

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.operation import (
    FORWARD,
    HEAD_DIM,
    Arrays,
    Case,
    Function,
    Operation,
    Shape,
    bf16,
    fp32,
    moved_bytes,
)
from based_jax.ops import token_layer
from based_jax.ops.decode_calls import Pieces

EPS = 1e-5
TAPS, TIMED_EXPANSION = 3, 2
"""Of the convolution; of what is timed F over D."""
WEIGHTS = frozenset({"scale", "first", "second", "bias", "kernel", "last_bias"})
SCALES = {"first": 0.03125, "second": 0.03125}  # sums about as large as 1; powers of two


def _arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the stream and what is to be added to it (B, D), the norm's scale, and the matrices, of `dims` (F,)."""
    (tokens, width), [hidden] = case.shape, case.dims
    narrow = {"y": (tokens, width), "first": (width, 2 * hidden), "second": (hidden, width)}
    return fp32({"r": (tokens, width), "scale": (width,)}) | bf16(narrow)


def _conv_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the same with biases, taps and the last inputs."""
    (tokens, width), [hidden] = case.shape, case.dims
    wide = fp32({"bias": (2 * hidden,), "last_bias": (width,), "kernel": (TAPS, hidden)})
    return _arrays(case) | wide | bf16({"before": (tokens, TAPS, hidden)})


def _function(case: Case) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        given = (arrays[name] for name in ("scale", "first", "second"))
        r, pieces = token_layer.token_mlp(arrays["r"], Pieces(arrays["y"][None]), *given, eps=EPS, impl=case.impl)
        return {"total": r, "added": jnp.sum(pieces.sums, axis=0)}

    return run


def _conv_function(case: Case) -> Function:
    names = "scale", "first", "bias", "kernel", "before", "second", "last_bias"

    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        given = (arrays[name] for name in names)
        found = token_layer.token_conv(arrays["r"], Pieces(arrays["y"][None]), *given, eps=EPS, impl=case.impl)
        r, pieces, state = found
        return {"total": r, "added": jnp.sum(pieces.sums, axis=0), "after": state}

    return run


def _first_product(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Return t and norm(t) W_1."""
    t = arrays["r"] + arrays["y"]
    root = jnp.sqrt(jnp.mean(t * t, axis=1, keepdims=True) + EPS)
    return t, t / root * arrays["scale"][None] @ arrays["first"]


def _silu(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.exp(-x))


def mlp_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return t, and u silu(g) W_2 with [u, g] = norm(t) W_1."""
    t, product = _first_product(arrays)
    u, g = jnp.split(product, 2, axis=1)
    return {"total": t, "added": u * _silu(g) @ arrays["second"]}


def conv_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return t, silu(sum_w kernel_w u_w) g W_2 + b_2 with [u, g] = norm(t) W_1 + b_1, and the last inputs u_w."""
    t, product = _first_product(arrays)
    u, g = jnp.split(product + arrays["bias"][None], 2, axis=1)
    inputs = jnp.concatenate([arrays["before"][:, 1:], u[:, None]], axis=1)
    h = _silu(jnp.sum(arrays["kernel"][None] * inputs, axis=1)) * g
    return {"total": t, "added": h @ arrays["second"] + arrays["last_bias"][None], "after": inputs}


def _cases(name: str) -> tuple[Case, ...]:
    make = functools.partial(Case, name)
    sizes = ((1024, 2048), (1792, 3584), (768, 640))
    return make((1, 256), (128,), quick=True), *(make((1, width), (hidden,)) for width, hidden in sizes)


def _operation(name: str, table, arrays, function, definition, **options) -> Operation:
    def cost(case: Case, which: str) -> tuple[float, float]:
        (tokens, width), [hidden] = case.shape, case.dims
        return moved_bytes(arrays(case), function(case.by("xla"))), 6.0 * tokens * width * hidden

    def timed(shape: Shape) -> Case:
        """Return that of one token, whatever the batch and the length."""
        width = shape[1] * HEAD_DIM
        return Case(name, (1, width), (TIMED_EXPANSION * width,))

    return Operation(
        table=table,
        arrays=arrays,
        function=function,
        oracle=lambda case: definition,
        cost=cost,
        kernels={"hopper_token": (name,)},
        cases=_cases(name),
        small_cases=(Case(name, (1, 256), (128,)),),
        timed={name: timed},
        weights=WEIGHTS,
        scales=SCALES,
        passes=(FORWARD,),
        **options,
    )


TOKEN_MLP = _operation("token_mlp", token_layer.MLP_IMPLEMENTATIONS, _arrays, _function, mlp_definition)
TOKEN_CONV = _operation(
    "token_conv",
    token_layer.CONV_IMPLEMENTATIONS,
    _conv_arrays,
    _conv_function,
    conv_definition,
    updates={"before": "after"},
)

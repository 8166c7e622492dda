"""The two ends of a mixer for a token that is decoded: products of the stream's norm, and one in pieces."""

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.few_tokens import TIMED_EXPANSION, product_definition
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
from based_jax.ops import token_products
from based_jax.ops.decode_calls import Pieces

EPS = 1e-5


def _arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the stream and what is to be added (B, D), the norm's scale, and (D, E), (D, F), of `dims` (E, F)."""
    (tokens, width), (first, second) = case.shape, case.dims
    narrow = {"y": (tokens, width), "first": (width, first), "second": (width, second)}
    return fp32({"r": (tokens, width), "scale": (width,)}) | bf16(narrow)


def _function(case: Case) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        kernels, y = (arrays["first"], arrays["second"]), Pieces(arrays["y"][None])
        found = token_products.token_products(arrays["r"], y, arrays["scale"], kernels, eps=EPS, impl=case.impl)
        total, (z, w) = found
        return {"total": total, "z": z, "w": w}

    return run


def products_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return t = r + y, and norm(t) W of both matrices."""
    t = arrays["r"] + arrays["y"]
    x = t / jnp.sqrt(jnp.mean(t * t, axis=1, keepdims=True) + EPS) * arrays["scale"][None]
    return {"total": t, "z": x @ arrays["first"], "w": x @ arrays["second"]}


def _cost(case: Case, which: str) -> tuple[float, float]:
    (tokens, width), columns = case.shape, case.dims
    return moved_bytes(_arrays(case), _function(case.by("xla"))), 2.0 * tokens * width * sum(columns)


def _timed(shape: Shape) -> Case:
    """Return that of one token, whatever the batch and the length: keys of Taylor attention beside values."""
    width = shape[1] * HEAD_DIM
    return Case("token_products", (1, width), (width // TIMED_EXPANSION, width))


TOKEN_PRODUCTS = Operation(
    table=token_products.PRODUCTS_IMPLEMENTATIONS,
    arrays=_arrays,
    function=_function,
    oracle=lambda case: products_definition,
    cost=_cost,
    kernels={"hopper_token": ("token_products",)},
    cases=(
        Case("token_products", (1, 256), (64, 192), quick=True),
        *(Case("token_products", (1, width), (512, 2 * width)) for width in (1024, 1792, 2048)),
    ),
    small_cases=(Case("token_products", (1, 128), (64, 128)),),
    timed={"token_products": _timed},
    weights=frozenset({"scale", "first", "second"}),
    scales={"first": 0.03125, "second": 0.03125},  # sums about as large as 1; powers of two
    passes=(FORWARD,),
)


def _sums_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a token (B, D) and a matrix (D, E), of `dims` (E,)."""
    (tokens, rows), [columns] = case.shape, case.dims
    return bf16({"x": (tokens, rows), "kernel": (rows, columns)})


def _sums(case: Case) -> Function:
    return lambda arrays, ids: {"y": token_products.token_sums(**arrays, impl=case.impl).sum(axis=0)}


def _sums_cost(case: Case, which: str) -> tuple[float, float]:
    (tokens, rows), [columns] = case.shape, case.dims
    return moved_bytes(_sums_arrays(case), _sums(case.by("xla"))), 2.0 * tokens * rows * columns


def _timed_sums(shape: Shape) -> Case:
    """Return that of one token, whatever the batch and the length."""
    width = shape[1] * HEAD_DIM
    return Case("token_sums", (1, width), (width,))


TOKEN_SUMS = Operation(
    table=token_products.SUMS_IMPLEMENTATIONS,
    arrays=_sums_arrays,
    function=_sums,
    oracle=lambda case: product_definition,
    cost=_sums_cost,
    kernels={"hopper_token": ("token_sums",)},
    cases=(
        Case("token_sums", (1, 256), (64,), quick=True),
        *(Case("token_sums", (1, rows), (columns,)) for rows, columns in ((1024, 1024), (1792, 1792), (4096, 2048))),
    ),
    small_cases=(Case("token_sums", (1, 128), (64,)),),
    timed={"token_sums": _timed_sums},
    weights=frozenset({"kernel"}),
    scales={"kernel": 0.03125},
    passes=(FORWARD,),
)

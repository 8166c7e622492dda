"""Products of the tokens that are decoded together with a layer's matrix, and what follows. They have no gradient."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.operation import (
    FORWARD,
    HEAD_DIM,
    Arrays,
    Case,
    Definition,
    Function,
    Operation,
    Shape,
    bf16,
    fp32,
    moved_bytes,
)
from based_jax.ops import few_tokens
from based_jax.ops.dispatch import Implementation

TIMED_EXPANSION = 4
"""Columns of what is timed over its rows."""


def _arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return M tokens (M, D) and a matrix (D, E), of `dims` (E,)."""
    (tokens, rows), [columns] = case.shape, case.dims
    return bf16({"x": (tokens, rows), "kernel": (rows, columns)})


def _function(case: Case, multiply: Callable) -> Function:
    return lambda arrays, ids: {"y": multiply(arrays["x"], arrays["kernel"], impl=case.impl)}


def product_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return x W."""
    return {"y": arrays["x"] @ arrays["kernel"]}


def gated_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return value silu(gate) with (value, gate) = x W."""
    value, gate = jnp.split(arrays["x"] @ arrays["kernel"], 2, axis=-1)
    return {"y": value * gate / (1 + jnp.exp(-gate))}


def _cases(name: str) -> tuple[Case, ...]:
    make = functools.partial(Case, name)
    return (
        make((3, 192), (384,), quick=True),
        *(make((tokens, 64), (128,)) for tokens in (64, 65, 128)),
        *(make((tokens, rows), (columns,)) for tokens in (1, 128) for rows, columns in ((1792, 7168), (4096, 2048))),
    )


def _product(name: str, table: Mapping[str, Implementation], multiply: Callable, definition: Definition) -> Operation:
    function = functools.partial(_function, multiply=multiply)

    def cost(case: Case, which: str) -> tuple[float, float]:
        (tokens, rows), [columns] = case.shape, case.dims
        return moved_bytes(_arrays(case), function(case.by("xla"))), 2.0 * tokens * rows * columns

    def timed(shape: Shape) -> Case:
        """Return that of B sequences' tokens, whatever their length."""
        batch, heads, _ = shape
        return Case(name, (batch, heads * HEAD_DIM), (TIMED_EXPANSION * heads * HEAD_DIM,))

    return Operation(
        table=table,
        arrays=_arrays,
        function=function,
        oracle=lambda case: definition,
        cost=cost,
        kernels={"hopper_strips": (name,)},
        cases=_cases(name),
        small_cases=(Case(name, (3, 128), (128,)),),
        timed={name: timed},
        weights=frozenset({"kernel"}),
        scales={"kernel": 0.03125},  # sums about as large as 1; a power of two
        passes=(FORWARD,),
        compile_seconds=1.0,
    )


FEW_TOKENS_PRODUCT = _product(
    "few_tokens_product", few_tokens.PRODUCT_IMPLEMENTATIONS, few_tokens.few_tokens_product, product_definition
)
FEW_TOKENS_GATED = _product(
    "few_tokens_gated", few_tokens.GATED_IMPLEMENTATIONS, few_tokens.few_tokens_gated, gated_definition
)


def _norm_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return those of a product, the stream r (M, E) that it is added to, and a bias and the norm's scale (E,)."""
    (tokens, _), [columns] = case.shape, case.dims
    return _arrays(case) | fp32({"r": (tokens, columns), "bias": (columns,), "scale": (columns,)})


def _residual_norm(case: Case) -> Function:
    def run(arrays, ids):
        r, x = few_tokens.few_tokens_residual_norm(**arrays, impl=case.impl)
        return {"r": r, "x": x}

    return run


def norm_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return r + x W + b, and it over the root of its mean square, times the scale."""
    total = arrays["r"] + arrays["x"] @ arrays["kernel"] + arrays["bias"][None]
    root = jnp.sqrt(jnp.mean(total**2, axis=-1, keepdims=True) + 1e-5)
    return {"r": total, "x": total / root * arrays["scale"][None]}


def _norm_cost(case: Case, which: str) -> tuple[float, float]:
    (tokens, rows), [columns] = case.shape, case.dims
    return moved_bytes(_norm_arrays(case), _residual_norm(case.by("xla"))), 2.0 * tokens * rows * columns


def _timed_norm(shape: Shape) -> Case:
    """Return that of B sequences' tokens, whatever their length."""
    batch, heads, _ = shape
    return Case("few_tokens_residual_norm", (batch, TIMED_EXPANSION * heads * HEAD_DIM), (heads * HEAD_DIM,))


FEW_TOKENS_RESIDUAL_NORM = Operation(
    table=few_tokens.NORM_IMPLEMENTATIONS,
    arrays=_norm_arrays,
    function=_residual_norm,
    oracle=lambda case: norm_definition,
    cost=_norm_cost,
    kernels={"hopper_strips": ("few_tokens_product", "few_tokens_norm")},
    cases=(
        Case("few_tokens_residual_norm", (3, 192), (384,), quick=True),
        *(Case("few_tokens_residual_norm", (tokens, 3584), (1792,)) for tokens in (1, 65, 128)),
        Case("few_tokens_residual_norm", (128, 4096), (2048,)),
    ),
    small_cases=(Case("few_tokens_residual_norm", (3, 128), (128,)),),
    timed={"few_tokens_residual_norm": _timed_norm},
    weights=frozenset({"kernel", "bias", "scale"}),
    scales={"kernel": 0.03125},
    passes=(FORWARD,),
    compile_seconds=1.0,
)


def _several_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return M tokens (M, D) and matrices (D, E) and (D, F), of `dims` (E, F)."""
    (tokens, rows), (first, second) = case.shape, case.dims
    return bf16({"x": (tokens, rows), "first": (rows, first), "second": (rows, second)})


def _several(case: Case) -> Function:
    def run(arrays, ids):
        kernels = arrays["first"], arrays["second"]
        y, z = few_tokens.few_tokens_products(arrays["x"], kernels, impl=case.impl)
        return {"y": y, "z": z}

    return run


def several_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return x W of both matrices."""
    return {"y": arrays["x"] @ arrays["first"], "z": arrays["x"] @ arrays["second"]}


def _several_cost(case: Case, which: str) -> tuple[float, float]:
    (tokens, rows), columns = case.shape, case.dims
    return moved_bytes(_several_arrays(case), _several(case.by("xla"))), 2.0 * tokens * rows * sum(columns)


def _timed_several(shape: Shape) -> Case:
    """Return that of B sequences' tokens, whatever their length: keys of Taylor attention beside values."""
    batch, heads, _ = shape
    return Case(
        "few_tokens_products", (batch, heads * HEAD_DIM), (heads * HEAD_DIM // TIMED_EXPANSION, heads * HEAD_DIM)
    )


FEW_TOKENS_PRODUCTS = Operation(
    table=few_tokens.PRODUCTS_IMPLEMENTATIONS,
    arrays=_several_arrays,
    function=_several,
    oracle=lambda case: several_definition,
    cost=_several_cost,
    kernels={"hopper_strips": ("few_tokens_product",)},
    cases=(
        Case("few_tokens_products", (3, 192), (64, 320), quick=True),
        *(Case("few_tokens_products", (tokens, 1792), (256, 1792)) for tokens in (1, 65, 128)),
    ),
    small_cases=(Case("few_tokens_products", (3, 128), (64, 128)),),
    timed={"few_tokens_products": _timed_several},
    weights=frozenset({"first", "second"}),
    scales={"first": 0.03125, "second": 0.03125},
    passes=(FORWARD,),
    compile_seconds=1.0,
)

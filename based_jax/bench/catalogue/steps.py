"""One token of what keeps a state: matrix states, selective scans and short convolutions as they decode.

A step has no time and no gradient. It takes the state `before` a token and returns the one `after`; its arrays and its
definition are those of its operation, of one token.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue import convolutions, matrix_states, state_spaces
from based_jax.bench.catalogue.operation import (
    FORWARD,
    HEAD_DIM,
    Arrays,
    Case,
    Definition,
    Function,
    Operation,
    Shape,
    moved_bytes,
)
from based_jax.ops import conv, delta_rule, gated_conv, gated_linear_attention, matrix_state_step, selective_scan
from based_jax.ops.dispatch import Implementation

MANY_ROWS = 128
"""Of the largest batch that is checked at the sizes of models."""


def _arrays(case: Case, operation: Operation) -> dict[str, jax.ShapeDtypeStruct]:
    """Return those of an operation for one token, without time, and what is bf16 there in the case's dtype."""
    whole = operation.weights | {"state"}
    found = operation.arrays(dataclasses.replace(case, shape=(*case.shape, 1)))
    return {_of_step(name): _array(x, case.dtype, name in whole) for name, x in found.items()}


def _of_step(name: str) -> str:
    return "before" if name == "state" else name


def _array(x: jax.ShapeDtypeStruct, dtype: str, whole: bool) -> jax.ShapeDtypeStruct:
    shape = x.shape if whole else (x.shape[0], *x.shape[2:])
    return jax.ShapeDtypeStruct(shape, dtype if x.dtype == jnp.bfloat16 else x.dtype)


def _definition(operation: Operation, case: Case) -> Definition:
    """Return the definition of an operation, of one token."""
    whole, define = operation.weights | {"before"}, operation.oracle(case)

    def token(arrays: Arrays, ids: jax.Array) -> Arrays:
        over_time = {name: x if name in whole else x[:, None] for name, x in arrays.items()}
        found = define(over_time | {"state": arrays["before"]}, ids[:, None])
        after = found.pop("state")
        return {name: x[:, 0] for name, x in found.items()} | {"after": after}

    return token


def _function(case: Case, step: Callable, result: str) -> Function:
    """Return the step as a function: `step` takes the arrays and options, and returns a result and the state."""

    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        return dict(zip((result, "after"), step(arrays, impl=case.impl), strict=True))

    return run


def _step(
    name: str,
    operation: Operation,
    table: Mapping[str, Implementation],
    step: Callable,
    kernels: Mapping[str, tuple[str, ...]],
    cases: tuple[Case, ...],
    *,
    result: str,
    small: Case,
    timed: Callable[[Shape], Case],
) -> Operation:
    """Return a step; `timed` returns that of B sequences, whatever their length."""
    arrays = functools.partial(_arrays, operation=operation)
    function = functools.partial(_function, step=step, result=result)
    return Operation(
        table=table,
        arrays=arrays,
        function=function,
        oracle=functools.partial(_definition, operation),
        # Numbers that meet once: their products take no time.
        cost=lambda case, which: (moved_bytes(arrays(case), function(case.by("xla"))), 0.0),
        kernels=kernels,
        cases=cases,
        small_cases=(small,),
        timed={name: timed},
        weights=operation.weights,
        passes=(FORWARD,),
        updates={"before": "after"},
        compile_seconds=2.0,
    )


def _given(arrays: Arrays) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    q, k, v, g = (arrays[name] for name in ("q", "k", "v", "g"))
    return q, k, v, matrix_states.CHECKED.log_decays(g)


def _attention(arrays: Arrays, **options: Any) -> tuple[jax.Array, jax.Array]:
    return gated_linear_attention.gated_linear_attention_step(*_given(arrays), arrays["before"], **options)


def _correction(arrays: Arrays, **options: Any) -> tuple[jax.Array, jax.Array]:
    q, k, v, log_decay = _given(arrays)
    k, beta = matrix_states.CHECKED.keys(k), matrix_states.CHECKED.rates(arrays["beta"])
    return delta_rule.delta_rule_step(q, k, v, log_decay, beta, arrays["before"], **options)


def _low_rank(arrays: Arrays, **options: Any) -> tuple[jax.Array, jax.Array]:
    a, b = matrix_states.read_and_written(arrays["direction"])
    return delta_rule.dplr_step(*_given(arrays), a, b, arrays["before"], **options)


def _matrix_step(name: str, operation: Operation, step: Callable, *, heads: int, dims: tuple[int, int]) -> Operation:
    """Return the step of a matrix state, checked at a model's heads and dims too."""
    make = functools.partial(Case, name)
    return _step(
        name,
        operation,
        matrix_state_step.IMPLEMENTATIONS,
        step,
        {"hopper_states": ("matrix_state_step",)},
        (
            make((1, 3), (48, 96), quick=True),
            *(make((5, 3), (48, 96), dtype=dtype) for dtype in ("bfloat16", "float32")),
            make((3, 1), (16, 32), dtype="float32"),
            make((2, 2), (256, 160)),
            *(make((batch, heads), dims) for batch in (1, MANY_ROWS)),
        ),
        result="o",
        small=make((2, 3), (48, 96)),
        timed=lambda shape: make(shape[:2], dims),
    )


GATED_LINEAR_ATTENTION_STEP = _matrix_step(
    "gated_linear_attention_step", matrix_states.GATED_LINEAR_ATTENTION, _attention, heads=32, dims=(64, 64)
)
SIMPLE_GLA_STEP = _matrix_step("simple_gla_step", matrix_states.SIMPLE_GLA, _attention, heads=64, dims=(128, 64))
DELTA_RULE_STEP = _matrix_step("delta_rule_step", matrix_states.DELTA_RULE, _correction, heads=16, dims=(128, 128))
GATED_DELTA_RULE_STEP = _matrix_step(
    "gated_delta_rule_step", matrix_states.GATED_DELTA_RULE, _correction, heads=4, dims=(256, 512)
)
DPLR_STEP = _matrix_step("dplr_step", matrix_states.DPLR, _low_rank, heads=32, dims=(64, 64))


def _scan(arrays: Arrays, **options: Any) -> tuple[jax.Array, jax.Array]:
    dt, A = state_spaces.steps_and_rates(arrays["dt"], arrays["A"])
    dt = arrays["dt"] if "bias" in arrays else dt
    given = arrays["u"], dt, A, arrays["B"], arrays["C"], arrays["before"]
    return selective_scan.selective_scan_step(*given, bias=arrays.get("bias"), **options)


def _scan_step(name: str, operation: Operation) -> Operation:
    make = functools.partial(Case, name)
    return _step(
        name,
        operation,
        selective_scan.STEP_IMPLEMENTATIONS,
        _scan,
        {"hopper_states": ("selective_scan_step",)},
        (
            make((3, 384), (16,), quick=True),
            *(make((1, 128), (states,), dtype=dtype) for states in (8, 32) for dtype in ("bfloat16", "float32")),
            *(make((batch, 4096), (16,)) for batch in (1, MANY_ROWS)),
        ),
        result="y",
        small=make((2, 128), (16,)),
        timed=lambda shape: make((shape[0], shape[1] * HEAD_DIM), (16,)),
    )


SELECTIVE_SCAN_STEP = _scan_step("selective_scan_step", state_spaces.SELECTIVE_SCAN)
RAW_SELECTIVE_SCAN_STEP = _scan_step("raw_selective_scan_step", state_spaces.RAW_SELECTIVE_SCAN)


def _with_inputs(operation: Operation, inputs: Callable[[Arrays], jax.Array]) -> Operation:
    """Return a convolution whose definition returns the last inputs too, of one token."""

    def definition(arrays: Arrays, ids: jax.Array, define: Definition) -> Arrays:
        after = jnp.concatenate([arrays["state"][:, 1:], inputs(arrays)], axis=1)
        return define(arrays, ids) | {"state": after}

    return dataclasses.replace(
        operation, oracle=lambda case: functools.partial(definition, define=operation.oracle(case))
    )


def _gated_inputs(arrays: Arrays) -> jax.Array:
    u, _ = jnp.split(arrays["x"] + arrays["bias"][None, None], 2, axis=-1)
    return u


def _convolution(arrays: Arrays, *, convolve: Callable, **options: Any) -> tuple[jax.Array, jax.Array]:
    return convolve(arrays["x"], arrays["kernel"], arrays["before"], bias=arrays["bias"], **options)


def _convolution_step(
    name: str,
    operation: Operation,
    table: Mapping[str, Implementation],
    convolve: Callable,
    *,
    channels: int,
    taps: int,
) -> Operation:
    """Return the step of a convolution, checked at a model's channels and taps too."""
    make = functools.partial(Case, name)
    return _step(
        name,
        operation,
        table,
        functools.partial(_convolution, convolve=convolve),
        {"hopper_taps": ("short_conv_step",)},
        (
            # Of few outputs some cancel, and what bf16 inputs are rounded to gives those to no 5e-3.
            make((5, 384), (taps,), quick=True),
            *(make((15, 128), (taps,), dtype=dtype) for dtype in ("bfloat16", "float32")),
            *(make((15, 128), (other,)) for other in (2, 8)),
            *(make((batch, channels), (taps,)) for batch in (1, MANY_ROWS)),
        ),
        result="y",
        small=make((2, 128), (taps,)),
        timed=lambda shape: make((shape[0], shape[1] * HEAD_DIM), (taps,)),
    )


SHORT_CONV_STEP = _convolution_step(
    "short_conv_step",
    _with_inputs(convolutions.SHORT_CONV, lambda arrays: arrays["x"]),
    conv.STEP_IMPLEMENTATIONS,
    functools.partial(conv.short_conv_step, silu=True),
    channels=4096,
    taps=4,
)
GATED_SHORT_CONV_STEP = _convolution_step(
    "gated_short_conv_step",
    _with_inputs(convolutions.GATED_SHORT_CONV, _gated_inputs),
    gated_conv.STEP_IMPLEMENTATIONS,
    gated_conv.gated_short_conv_step,
    channels=3584,
    taps=3,
)

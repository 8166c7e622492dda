"""The cases of a check: what each is given, the function that is called, and what stands for several of them."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import PartitionSpec

from based_jax import parallel
from based_jax.bench.catalogue import OPERATIONS
from based_jax.bench.catalogue.operation import BOTH, Case, Definition, Function
from based_jax.bench.comparison import both_passes, forward_alone

VMAP_LANES = 2
SHORTEST_ORACLE = 72
"""Tokens that a definition is compiled for at least, so that one serves many lengths."""


def all_cases() -> list[Case]:
    """Return the cases of every operation, by each implementation that is checked."""
    return [case for x in OPERATIONS.values() for impl in x.checked_impls for case in x.cases_of(impl)]


def small_cases() -> list[Case]:
    """Return a small case of every kernel, for tools that slow it down."""
    return [case.by(impl) for x in OPERATIONS.values() for impl in x.kernels for case in x.small_cases]


def plain(case: Case) -> Case:
    """Return the call without a state and documents, which some kernels know nothing of."""
    return dataclasses.replace(case, state=False, documents=False)


def same_program(case: Case) -> Case:
    """Return what stands for all cases with the same compiled call."""
    return dataclasses.replace(case, values="plain", quick=False)


def same_oracle(case: Case) -> Case:
    """Return what stands for all cases with the same compiled oracle, which fills up short sequences with padding."""
    shape = *case.shape[:2], *(max(time, SHORTEST_ORACLE) for time in case.shape[2:])
    return Case(case.operation, shape, case.dims, state=True, window=case.window, dtype=case.dtype)


def arrays_of(case: Case) -> dict[str, ShapeDtypeStruct]:
    """Return the shapes of the arrays that a case is given."""
    found = OPERATIONS[case.operation].arrays(case)
    return {name: x for name, x in found.items() if name != "state" or case.state}


def results_of(case: Case) -> dict[str, ShapeDtypeStruct]:
    """Return the shapes of what a case returns, but of a final state only with an initial one."""
    # The plain form stands for all: they return the same, and it can be traced for any device.
    ids = ShapeDtypeStruct(case.places, jnp.int32) if case.documents else None
    found = jax.eval_shape(OPERATIONS[case.operation].function(case.by("xla")), arrays_of(case), ids)
    return {name: x for name, x in found.items() if name != "state" or case.state}


def gradients_of(case: Case) -> dict[str, ShapeDtypeStruct]:
    """Return the shapes of the results' gradients, none where the operation has no backward pass."""
    return results_of(case) if BOTH in OPERATIONS[case.operation].passes else {}


def draw(case: Case, rng: np.random.Generator) -> tuple[dict, dict, np.ndarray | None]:
    """Return the results' gradients, the arrays and the documents' ids of a case."""
    operation = OPERATIONS[case.operation]
    arrays = {name: _normal(rng, x, operation.scales.get(name, 1.0)) for name, x in arrays_of(case).items()}
    factors = {} if case.values == "plain" else operation.factors[case.values]
    for name, factor in factors.items():
        # Powers of two and thirty: the product is rounded to bf16 before anyone reads it.
        first = case.shape[2] * 3 // 4 if case.values == "late" else 0
        arrays[name][:, first:] = (arrays[name][:, first:].astype(np.float32) * factor).astype(arrays[name].dtype)
    if case.state and operation.state:
        arrays["state"] = operation.state(case, rng)
    gradients = {name: _normal(rng, x, 0.1 if name == "state" else 1.0) for name, x in gradients_of(case).items()}
    return gradients, arrays, packed_ids(rng, *case.places) if case.documents else None


def complete(case: Case, gradients: dict, arrays: dict, ids: np.ndarray | None) -> tuple[dict, dict, np.ndarray]:
    """Return the same in fp64, with zeros for what the case has not and padding at its end, for `same_oracle`."""

    def fill(x, shape):
        return np.pad(x, [(0, size - own) for size, own in zip(shape, x.shape, strict=True)])

    def widen(given, shapes):
        empty = {name: np.zeros(x.shape) for name, x in shapes.items() if name not in given}
        return empty | {name: fill(np.asarray(x, np.float64), shapes[name].shape) for name, x in given.items()}

    whole = same_oracle(case)
    ids = fill(np.ones(case.places, np.int32) if ids is None else ids, whole.places)
    return widen(gradients, gradients_of(whole)), widen(arrays, arrays_of(whole)), ids


def _normal(rng: np.random.Generator, x: ShapeDtypeStruct, scale: float) -> np.ndarray:
    return (scale * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)


def packed_ids(rng: np.random.Generator, batch: int, time: int) -> np.ndarray:
    """Return (B, T) ids of documents of any length, with padding between, after and (but in the first row) before."""
    rows: list[list[int]] = []
    for _ in range(batch):
        row = [0] * int(rng.integers(0, 1 + time // 8)) if rows else []
        longest = int(rng.integers(1, 2 + min(time, 600)))
        while len(row) < time:
            row += [len(row) + 1] * int(rng.integers(1, 1 + longest))
            row += [0] * int(rng.integers(0, 2) * rng.integers(0, 1 + longest // 2))
        rows.append(row[:time])
    return np.array(rows, np.int32)


def passes_of(case: Case, function: Function | Definition) -> Callable:
    """Return the passes that the case's operation has, of it or of its definition (`comparison.both_passes`)."""
    return (both_passes if BOTH in OPERATIONS[case.operation].passes else forward_alone)(function)


def function_of(case: Case) -> Function:
    """Return the function as the case calls it: as it is, in lanes of jax.vmap, or in jax.shard_map over the batch."""
    operation = OPERATIONS[case.operation]
    function, weights = operation.function(case), operation.weights

    def lanes(arrays, ids):
        def split(x):
            return x.reshape(VMAP_LANES, -1, *x.shape[1:])

        axes = {name: None if name in weights else 0 for name in arrays}
        arrays = {name: x if name in weights else split(x) for name, x in arrays.items()}
        if ids is None:
            out = jax.vmap(lambda arrays: function(arrays, None), (axes,))(arrays)
        else:
            out = jax.vmap(function, (axes, 0))(arrays, split(ids))
        return {name: x.reshape(-1, *x.shape[2:]) for name, x in out.items()}

    def shards(arrays, ids):
        devices = jax.devices()[: math.gcd(len(jax.devices()), case.shape[0])]
        rows, mesh = PartitionSpec(parallel.BATCH_AXES), parallel.make_mesh(devices=devices)
        specs = {name: PartitionSpec() if name in weights else rows for name in arrays}
        if ids is None:
            return jax.shard_map(lambda x: function(x, None), mesh=mesh, in_specs=(specs,), out_specs=rows)(arrays)
        return jax.shard_map(function, mesh=mesh, in_specs=(specs, rows), out_specs=rows)(arrays, ids)

    return {"call": function, "vmap": lanes, "shard_map": shards}[case.through]

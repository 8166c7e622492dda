"""The catalogue knows every operation with a GPU's kernels, and every kernel that these run."""

import contextlib
import dataclasses
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from jax.extend.core import jaxprs_in_params

import based_jax.ops
from based_jax.bench import cases
from based_jax.bench.catalogue import OPERATIONS
from based_jax.bench.catalogue.operation import BOTH
from based_jax.bench.comparison import TOLERANCE
from based_jax.errors import UserError
from based_jax.ops.dispatch import Implementation

LIBRARIES = {"cudnn_flash"}
"""Implementations that run nobody's kernels but a library's."""
DECODING = [case for case in cases.small_cases() if BOTH not in OPERATIONS[case.operation].passes]


def tables():
    """Return all tables of implementations of `based_jax.ops`."""
    names = [module.name for module in pkgutil.walk_packages(based_jax.ops.__path__, "based_jax.ops.")]
    found = [x for name in names for x in vars(importlib.import_module(name)).values() if isinstance(x, dict)]
    return [x for x in found if x and all(isinstance(entry, Implementation) for entry in x.values())]


def accelerated(table):
    return {name for name, entry in table.items() if entry.platform == "cuda"}


def test_every_table_with_a_gpu_s_implementation_is_in_the_catalogue():
    known = [operation.table for operation in OPERATIONS.values()]
    assert len(tables()) >= 10
    assert all(any(table is other for other in known) for table in tables() if accelerated(table))


@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_are_named_for_every_accelerated_implementation(name):
    operation = OPERATIONS[name]
    assert set(operation.kernels) == accelerated(operation.table) - LIBRARIES
    assert operation.cases and bool(operation.kernels) == bool(operation.small_cases)


def launched(jaxpr):
    """Return the names of the kernels that a program launches."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("triton_kernel_call", "mpmd_map"):
            yield equation.params["name"]
        for inner in jaxprs_in_params(equation.params):
            yield from launched(inner)


def traced(case):
    """Return the shapes of a call's results, traced anew."""
    return jax.eval_shape(lambda arrays: cases.function_of(case)(arrays, None), cases.arrays_of(case))


REFUSED = {
    "ssd": {("hopper_steps", (64, 64))},
    "attention": {("hopper_turns", dims) for dims in ((64, 128), (96, 96), (128, 128), (256, 256))},
    "dplr": {("hopper_chunks", (128, 128))},
}
"""By which implementations, and at which dims: Mamba's kernels take at most 32 states, turns heads of at most 80, the
chunks of RWKV-7's rule keys of at most 64."""


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.kernels])
def test_hopper_gpus_refuse_no_other_case(name, monkeypatch):
    """It is asked before a kernel is traced: the plainest program stands for each, since theirs take long."""
    chosen = {
        dataclasses.replace(cases.same_program(case), state=False, documents=False, through="call")
        for case in cases.all_cases()
        if case.operation == name
    }
    refused, table = set(), OPERATIONS[name].table
    *_, plain = (entry.compute for entry in table.values() if entry.platform is None)
    for impl, entry in table.items():
        monkeypatch.setitem(table, impl, dataclasses.replace(entry, compute=plain))
    with gpus():
        for case in chosen:
            try:
                traced(case)
            except UserError:
                refused.add((case.impl, case.dims))
    assert refused == REFUSED.get(name, set())


def kernels_of(case):
    """Return the names of the kernels of all passes of a call on a Hopper GPU."""
    arrays, gradients = cases.arrays_of(case), cases.gradients_of(case)
    ids = jax.ShapeDtypeStruct(case.places, jnp.int32) if case.documents else None
    passes = cases.passes_of(case, cases.function_of(case))
    with gpus():
        return {*launched(jax.make_jaxpr(passes)(gradients, arrays, ids).jaxpr)}


@pytest.mark.parametrize("case", cases.small_cases(), ids=str)
def test_every_kernel_has_one_of_its_implementation_s_names(case):
    try:
        names = kernels_of(case)
    except UserError:
        names = kernels_of(cases.plain(case))
    begins = OPERATIONS[case.operation].kernels[case.impl]
    assert names and all(name.startswith(begins) for name in names), names


def test_one_token_of_ssd_is_checked_in_as_many_rows_as_its_roundings_ask_for():
    """Of one token B gets C times the sum of the heads' dt x . dy: 8 numbers of 8 rows, which may be small."""
    rng = np.random.default_rng(0)
    [case] = {x.shape for x in OPERATIONS["ssd"].cases if x.shape[2] == 1}
    (rows, heads, _), (states, channels), programs = case, (16, 64), 2

    def bf16(x):
        return x.astype(jnp.bfloat16).astype(np.float64)

    def fails(rows):
        shape = 4000 // rows, rows, programs, heads // programs
        x, dy = (bf16(rng.standard_normal((*shape, channels), np.float32)) for _ in "xy")
        dt = np.log1p(np.exp(rng.standard_normal((*shape, 1)) - 2))
        C = bf16(rng.standard_normal((*shape[:2], 1, states), np.float32))
        wanted = (dt * x * dy).sum((2, 3, 4))[..., None] * C[:, :, 0]
        parts = bf16((bf16(dt * x) * dy).sum((3, 4)))[..., None]
        off = bf16(bf16(parts * C).sum(2)) - wanted
        return (np.linalg.norm(off, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2)) > TOLERANCE).mean()

    assert fails(rows) == 0 and fails(8) > 0.03


@pytest.mark.parametrize("case", [x for x in DECODING if x.impl.startswith("hopper")], ids=str)
def test_what_decodes_runs_or_is_refused_in_shard_map(case):
    """`jax.shard_map` asks of each result over which devices it varies; a kernel that writes in place cannot say it."""
    operation, arrays = OPERATIONS[case.operation], cases.arrays_of(case)
    rows = {name: x for name, x in arrays.items() if name not in operation.weights}
    whole = {name: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype) for name, x in rows.items()}
    specs = {name: jax.P("data") if name in rows else jax.P() for name in arrays}

    def trace(case):
        function = operation.function(case)
        call = jax.shard_map(lambda x: function(x, None), in_specs=(specs,), out_specs=jax.P("data"))
        jax.eval_shape(call, arrays | whole)

    with gpus(shape=(2,)):
        with contextlib.suppress(UserError):
            trace(case)
        trace(case.by("auto"))

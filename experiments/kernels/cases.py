"""What `check` and `sanitize` run: the cases of each operation, their inputs, and the ways of calling it."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, PartitionSpec

from based_jax.ops.dispatch import named
from experiments.kernels import oracles
from experiments.kernels.operations import OPERATIONS, Case, arrays_of, basic, gradients_of

LANES = 2
"""Of `jax.vmap`."""
NORMS = "residual_rms_norm", "residual_layer_norm", "rms_norm", "layer_norm"
BY_CHUNKS = "gated_delta_rule", "simple_gla", "delta_rule_by_chunks", "gated_linear_attention_by_chunks"
RECURRENCES = "delta_rule", "gated_linear_attention", *BY_CHUNKS
FACTORS = {
    "taylor_attention": {"late": {"k": 30, "v": 30}, "large": {"q": 4, "k": 4}},
    "window_attention": {"late": {"v": 30}, "large": {"q": 2, "k": 2}},
}
"""By which inputs that are not plain are larger: `late` ones in the last quarter of the tokens alone."""


def draw(case: Case, rng: np.random.Generator) -> tuple[dict, dict, np.ndarray | None]:
    """Return the outputs' gradients, the arrays and the documents' ids of a case."""
    arrays = {name: _normal(rng, x) for name, x in arrays_of(case).items()}
    for name, factor in FACTORS.get(case.operation, {}).get(case.values, {}).items():
        # Powers of two and thirty: the product is rounded to bf16 before anyone reads it.
        first = case.shape[2] * 3 // 4 if case.values == "late" else 0
        arrays[name][:, first:] = (arrays[name][:, first:].astype(np.float32) * factor).astype(arrays[name].dtype)
    if case.state and case.operation == "taylor_attention":
        arrays["state"] = _taylor_state(case, rng)
    gradients = {name: _normal(rng, x, 0.1 if name == "state" else 1.0) for name, x in gradients_of(case).items()}
    return gradients, arrays, packed_ids(rng, *case.shape[::2]) if case.documents else None


def complete(case: Case, gradients: dict, arrays: dict, ids: np.ndarray | None) -> tuple[dict, dict, np.ndarray]:
    """Return the same in fp64, with zeros for what the case has not and padding at its end, for `basic`'s oracle."""

    def fill(x, shape):
        return np.pad(x, [(0, size - own) for size, own in zip(shape, x.shape, strict=True)])

    def widen(given, shapes):
        empty = {name: np.zeros(x.shape) for name, x in shapes.items() if name not in given}
        return empty | {name: fill(np.asarray(x, np.float64), shapes[name].shape) for name, x in given.items()}

    whole = basic(case)
    ids = fill(np.ones(case.shape[::2], np.int32) if ids is None else ids, whole.shape[::2])
    return widen(gradients, gradients_of(whole)), widen(arrays, arrays_of(whole)), ids


def _normal(rng: np.random.Generator, x: ShapeDtypeStruct, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)


def _taylor_state(case: Case, rng: np.random.Generator, tokens: int = 50) -> np.ndarray:
    """Return the state that some tokens leave."""
    (batch, heads, _), (k, v) = case.shape, case.dims
    keys, values = (rng.standard_normal((batch, tokens, heads, width)) for width in (k, v))
    phi, v1 = oracles.features(keys, np.concatenate), oracles.with_ones(values, np.concatenate)
    return np.einsum("bthe,bthv->bhev", phi, v1).astype(np.float32)


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


def through(case: Case, call: Callable) -> Callable:
    """Return `call` as the case makes it: as it is, in lanes of jax.vmap, or in jax.shard_map over the batch."""
    weights = OPERATIONS[case.operation].weights

    def lanes(arrays, ids):
        def split(x):
            return x.reshape(LANES, -1, *x.shape[1:])

        axes = {name: None if name in weights else 0 for name in arrays}
        arrays = {name: x if name in weights else split(x) for name, x in arrays.items()}
        if ids is None:
            out = jax.vmap(lambda arrays: call(arrays, None), (axes,))(arrays)
        else:
            out = jax.vmap(call, (axes, 0))(arrays, split(ids))
        return {name: x.reshape(-1, *x.shape[2:]) for name, x in out.items()}

    def shards(arrays, ids):
        devices = jax.devices()[: math.gcd(len(jax.devices()), case.shape[0])]
        rows, mesh = PartitionSpec("data"), Mesh(np.array(devices), ("data",))
        specs = {name: PartitionSpec() if name in weights else rows for name in arrays}
        if ids is None:
            return jax.shard_map(lambda x: call(x, None), mesh=mesh, in_specs=(specs,), out_specs=rows)(arrays)
        return jax.shard_map(call, mesh=mesh, in_specs=(specs, rows), out_specs=rows)(arrays, ids)

    return {"call": call, "vmap": lanes, "shard_map": shards}[case.through]


def _taylor_cases() -> list[Case]:
    make = functools.partial(Case, "taylor_attention")
    both = ({}, {"state": True, "documents": True})
    cases = []
    for time in (1, 15, 16, 63, 64, 65):
        quick = time in (1, 65)
        cases += [make((2, 3, time), (16, 64), quick=quick and bool(x), **x) for x in both]
    cases += [make((2, 3, 65), (16, 64), **{name: True}) for name in ("state", "documents")]
    cases += [make((8, 16, 2048), (16, 64), quick=not x, **x) for x in both]
    cases += [make((2, 4, 2048), (16, 64), values=x, quick=x == "late") for x in ("plain", "late", "large")]
    cases += [make((1, 1, 4097), (16, 64), values=x, **y) for x in ("plain", "late") for y in both]
    cases += [make((1, 2, 2049), (16, 64), quick=bool(x), **x) for x in both]
    cases += [make((1, 2, 2049), (16, 64), **{name: True}) for name in ("state", "documents")]
    cases += [make((3, 50, 130), (16, 64), **x) for x in both]
    cases += [make((1, 16, 32768), (16, 64), quick=True), make((2, 4, 32768), (16, 64), **both[1])]
    for dims in ((8, 64), (16, 112), (16, 128), (8, 112)):
        cases += [make((2, 3, 65), dims, quick=dims == (8, 112), **both[1]), make((1, 2, 2049), dims)]
    return cases + [make((4, 3, 130), (16, 64), through=x, **both[1], quick=True) for x in ("vmap", "shard_map")]


def _window_cases() -> list[Case]:
    make = functools.partial(Case, "window_attention", dims=(64, 64))
    wide = functools.partial(Case, "window_attention", (2, 3, 200), documents=True)
    cases = [make((2, 3, time), window=64, documents=x) for time in (1, 16, 63, 65, 2049) for x in (False, True)]
    for window in (7, 128, 129):
        cases += [make((2, 3, time), window=window, documents=time == 1000) for time in (65, 1000)]
    cases += [make((8, 16, 2048), window=x, quick=x == 64) for x in (64, 128)]
    cases += [wide((112, 112), window=64), wide((128, 128), window=129)]
    cases += [make((1, 2, 32768), window=128, documents=True)]
    cases += [make((2, 3, 1000), window=64, values=x, documents=True, quick=x == "late") for x in ("late", "large")]
    return cases + [make((4, 3, 130), window=64, documents=True, through=x) for x in ("vmap", "shard_map")]


def _conv_cases() -> list[Case]:
    cases, both = [], {"state": True, "documents": True}
    for name, usual, others in (("gated_short_conv", 3, (2, 4)), ("short_conv", 4, (2, 3))):
        make = functools.partial(Case, name)
        cases += [make((2, 384, time), (usual,), **x) for time in (1, 15, 65) for x in ({}, both)]
        cases += [make((3, 128, 130), (taps,), **both) for taps in others]
        cases += [make((8, 1024, 2048), (usual,), quick=True), make((2, 2048, 2049), (usual,), **both, quick=True)]
        cases += [make((4, 256, 130), (usual,), documents=True, through=x) for x in ("vmap", "shard_map")]
    return cases


def _norm_cases() -> list[Case]:
    shapes, cases = [(1, 128, 1024), (1, 384, 1025), (2, 1792, 2049), (1, 4096, 1030), (4, 64, 2050)], []
    for name in NORMS:
        make = functools.partial(Case, name)
        cases += [*map(make, shapes), make((8, 1024, 2048), quick=True)]
        cases += [make((4, 256, 600), through=x) for x in ("vmap", "shard_map")]
    return cases


def _scan_cases() -> list[Case]:
    make, both = functools.partial(Case, "selective_scan"), {"state": True, "documents": True}
    cases = [make((2, 128, time), (16,), **x) for time in (1, 15, 65) for x in ({}, both)]
    cases += [make((3, 256, 130), (states,), **both) for states in (8, 24, 32)]
    cases += [make((32, 256, 256), (16,), quick=True), make((2, 512, 2049), (16,), **both, quick=True)]
    return cases + [make((4, 128, 130), (16,), documents=True, through=x) for x in ("vmap", "shard_map")]


def _recurrence_cases() -> list[Case]:
    both, cases = {"state": True, "documents": True}, []
    for name in RECURRENCES:
        make = functools.partial(Case, name)
        # Of few gradients of a short sequence some cancel, and products of bf16 give those to no 5e-3.
        few, rows = (64, 16) if name in BY_CHUNKS else (2, 2)
        cases += [make((few, 2, time), (32, 32), **x) for time in (1, 15, 65) for x in ({}, both)]
        cases += [make((rows, 3, 130), x, **both) for x in ((24, 48), (64, 64), (64, 128), (128, 128), (128, 192))]
        cases += [make((64, 2, 256), (64, 64), quick=True), make((1, 5, 2049), (64, 64), **both)]
        cases += [make((4, 2, 130), (64, 64), documents=True, through=x) for x in ("vmap", "shard_map")]
    return cases


def _entropy_cases() -> list[Case]:
    make = functools.partial(Case, "linear_cross_entropy")
    cases = [make((2, 48, time), (1000,), documents=time > 1) for time in (1, 65)]
    cases += [make((3, channels, 130), (1001,), documents=True) for channels in (64, 128, 192, 256)]
    cases += [make((8, 128, 1024), (8192,), quick=True), make((1, 64, 1000), (50257,), quick=True)]
    return cases + [make((4, 64, 130), (1000,), documents=True, through=x) for x in ("vmap", "shard_map")]


def all_cases() -> list[Case]:
    """Return the cases of every operation that has a kernel."""
    first = [*_taylor_cases(), *_window_cases(), *_conv_cases(), *_norm_cases(), *_scan_cases()]
    found = [*first, *_recurrence_cases(), *_entropy_cases()]
    return [case for case in found if named(OPERATIONS[case.operation].table, OPERATIONS[case.operation].kernel)]


def tiny_cases() -> list[Case]:
    """Return a small case of every kernel, for tools that slow it down; 550 tokens are two pieces."""
    shape, both = (1, 2, 130), {"state": True, "documents": True}
    cases = [Case("taylor_attention", shape, (16, 64)), Case("taylor_attention", (1, 2, 550), (16, 64), **both)]
    cases += [Case("window_attention", shape, (64, 64), window=x, documents=x == 129) for x in (64, 129)]
    cases += [Case(name, (1, 256, 130), (3,), documents=True) for name in ("gated_short_conv", "short_conv")]
    cases += [Case(name, (1, 256, 1030)) for name in NORMS]
    cases += [Case("selective_scan", (1, 128, 50), (16,), **both)]
    cases += [Case(name, (1, 2, 50), (64, 64), **both) for name in RECURRENCES]
    cases += [Case("linear_cross_entropy", (1, 64, 130), (300,), documents=True)]
    return [case for case in cases if named(OPERATIONS[case.operation].table, OPERATIONS[case.operation].kernel)]

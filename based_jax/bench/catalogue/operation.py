"""What the catalogue says of an operation, and what a call of one is."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct

from based_jax.ops.dispatch import Implementation, named

PASSES = FORWARD, BOTH = "forward", "forward+backward"
BF16, FP32 = 2, 4
"""Bytes."""
HEAD_DIM = 64
"""Of what is timed: values of a head, and channels for each head where an operation has none."""

Shape = tuple[int, int, int]
Arrays = dict[str, jax.Array]
Function = Callable[[Arrays, jax.Array | None], Arrays]
"""Of the arrays by name and the ids of the documents (B, T), 0 for padding, or None."""
Definition = Callable[[Arrays, jax.Array], Arrays]
"""The same in fp64, in the paper's notation; the ids are given always, and so is a state."""
PACKED: dict[str, Any] = {"state": True, "documents": True}
"""A case's options for documents that go on from a state."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operation and, where it has them, its gradients.

    Attributes:
      operation: key of the catalogue.
      shape: (B, H, T), or (B, D, T) where there are no heads; of a step without T.
      dims: (K, V), (taps,), (states of a channel,), (tokens of the vocabulary,), or what the operation's arrays say.
      impl: implementation.
      state: from an initial state, and with a gradient of the final one.
      documents: packed ones, with padding.
      window: keys that a query sees.
      values: "plain", or a key of the operation's `factors`.
      through: "call", "vmap" or "shard_map".
      dtype: of a step's token, or what its state is kept in; all else has the dtypes of its operation.
      quick: part of the quick set.
    """

    operation: str
    shape: tuple[int, ...]
    dims: tuple[int, ...] = ()
    impl: str = "auto"
    state: bool = False
    documents: bool = False
    window: int | None = None
    values: str = "plain"
    through: str = "call"
    quick: bool = False
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        words = [self.operation, str(self.shape).replace(" ", "")] + ["x".join(map(str, self.dims))] * bool(self.dims)
        words += [f"window={self.window}"] * (self.window is not None)
        words += ["state"] * self.state + ["documents"] * self.documents
        words += [x for x in (self.values, self.through, self.dtype) if x not in ("plain", "call", "bfloat16")]
        return " ".join(words + [f"impl={self.impl}"] * (self.impl != "auto"))

    @property
    def places(self) -> tuple[int, ...]:
        """Where there may be a token: (B, T), or (B,) of a step, which has one a row."""
        return self.shape[::2]

    def by(self, impl: str) -> "Case":
        """Return the call by another implementation."""
        return dataclasses.replace(self, impl=impl)

    def rng(self, seed: int) -> np.random.Generator:
        """Return the case's own source of random numbers, the same for every implementation."""
        return np.random.default_rng([seed, zlib.crc32(str(self.by("auto")).encode())])


@dataclasses.dataclass(frozen=True)
class Operation:
    """All that checks, times and profiles ask of an operation.

    Attributes:
      table: its implementations.
      arrays: function of a case that returns the arrays that are drawn, by name; "state" only some calls get.
      function: function of a case that returns the operation as a `Function`, by the case's implementation.
      oracle: function of a case that returns its definition.
      cost: function of a case and a pass that returns the least (bytes, FLOPs) of a call without state or documents:
        every input read once, every result written once, what the backward pass needs read again.
      kernels: for each implementation that runs kernels of our own, what their names begin with. These are checked.
      cases: what `bench check` calls, by these or, where all are a library's, by the accelerated implementations; one
        that names an implementation is for that one alone.
      small_cases: for tools that slow a kernel down.
      timed: for each name in the benchmark's rows a function of (B, H, T) that returns the case.
      timed_function: as `function`, where what is timed makes other inputs of the arrays than what is checked.
      plain_timed: the plain form is timed along with the accelerated ones.
      weights: names of the arrays that belong to no row of a batch.
      scales: standard deviations of the arrays, where these are not 1.
      factors: by kind of values, by which some arrays are larger; of "late" ones the last quarter of the tokens alone.
      state: function of a case and a generator that returns its initial state, where that is not normal.
      passes: those that it has; what decodes has no gradient.
      updates: for each array that it writes where it lies, the result that this becomes.
      compile_seconds: of a call, roughly; only proportions matter.
    """

    table: Mapping[str, Implementation]
    arrays: Callable[[Case], dict[str, ShapeDtypeStruct]]
    function: Callable[[Case], Function]
    oracle: Callable[[Case], Definition]
    cost: Callable[[Case, str], tuple[float, float]]
    kernels: Mapping[str, tuple[str, ...]]
    cases: tuple[Case, ...]
    small_cases: tuple[Case, ...]
    timed: Mapping[str, Callable[[Shape], Case]]
    timed_function: Callable[[Case], Function] | None = None
    plain_timed: bool = True
    weights: frozenset[str] = frozenset()
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    factors: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    state: Callable[[Case, np.random.Generator], np.ndarray] | None = None
    passes: tuple[str, ...] = PASSES
    updates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 3.0

    @property
    def usual_impls(self) -> list[str]:
        """Return the implementations that are timed where none is named."""
        return self._accelerated + self.impls(["xla"]) * self.plain_timed

    @property
    def checked_impls(self) -> list[str]:
        """Return the implementations that are checked where none is named."""
        return list(self.kernels) or self._accelerated

    @property
    def _accelerated(self) -> list[str]:
        return [name for name, entry in self.table.items() if entry.platform == "cuda"]

    def cases_of(self, impl: str) -> list[Case]:
        """Return the cases that are checked by an implementation."""
        return [case.by(impl) for case in self.cases if case.impl in ("auto", impl)]

    def impls(self, names: Iterable[str]) -> list[str]:
        """Return those of the implementations named, or of the first ones of backends named, that the table has."""
        return list(dict.fromkeys(found for name in names if (found := named(self.table, name))))


def by_head(operation: str, dims: tuple[int, ...], **options: Any) -> Callable[[Shape], Case]:
    """Return the function of (B, H, T) that returns an operation's case."""
    return lambda shape: Case(operation, shape, dims, **options)


def by_channel(operation: str, dims: tuple[int, ...] = ()) -> Callable[[Shape], Case]:
    """Return the same for an operation without heads, with `HEAD_DIM` channels for each."""

    def case(shape: Shape) -> Case:
        batch, heads, time = shape
        return Case(operation, (batch, heads * HEAD_DIM, time), dims)

    return case


def tokens(case: Case) -> int:
    """Return the tokens of all heads, or of all channels."""
    batch, width, time = case.shape
    return batch * width * time


def queries_keys_values(case: Case) -> dict[str, ShapeDtypeStruct]:
    """Return the shapes of q and k (B, T, H, K) and v (B, T, H, V)."""
    (batch, heads, time), (k, v) = case.shape, case.dims
    return bf16({name: (batch, time, heads, width) for name, width in (("q", k), ("k", k), ("v", v))})


def narrow(case: Case, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ShapeDtypeStruct]:
    """Return the arrays of these shapes in the case's dtype."""
    return {name: ShapeDtypeStruct(shape, case.dtype) for name, shape in shapes.items()}


def moved_bytes(arrays: Mapping[str, ShapeDtypeStruct], function: Function) -> int:
    """Return the bytes of what a forward pass takes and returns."""
    results = jax.eval_shape(function, dict(arrays), None)
    return sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *results.values()))


def bf16(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ShapeDtypeStruct]:
    """Return the arrays of these shapes."""
    return {name: ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}


def fp32(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ShapeDtypeStruct]:
    """Return the arrays of these shapes."""
    return {name: ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

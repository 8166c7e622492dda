"""What a compiled program does on each device: the products it makes, what its loops carry, what devices exchange.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; here it counts as often as it runs.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast"
ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|c64)\[([\d,]*)\]")
LINE = re.compile(r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<result>\(.*?\)|\S+) (?P<kind>[a-z][\w-]*)\((?P<rest>.*)$")
CALLED = re.compile(r"\b(?:body|condition|calls|to_apply)=%([\w.-]+)|\bbranch_computations=\{([^}]*)\}")

Shape = tuple[int, ...]


class Exchange(NamedTuple):
    """An array that a collective operation returns on each device."""

    kind: str
    dtype: str
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program's text; `times` is how often it runs."""

    name: str
    kind: str
    results: tuple[tuple[str, Shape], ...]
    rest: str
    times: int = 1

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of its results."""
        return tuple(shape for _, shape in self.results)

    @property
    def operands(self) -> list[str]:
        """The names of what it takes."""
        return re.findall(r"%([\w.-]+)", self.rest.split("), ")[0])

    def attribute(self, name: str) -> tuple[int, ...]:
        """Return an attribute that is a list of numbers, empty where there is none."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.rest)
        return _numbers(found[1]) if found else ()

    @property
    def trips(self) -> int:
        """How often the loop that this is runs."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.rest)
        assert found, f"loop {self.name} says not how often it runs"
        return int(found[1])


class Program:
    """The text of a compiled program (`jax.stages.Compiled.as_text()`), one computation after the other."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = collections.defaultdict(list)
        for line in text.splitlines():
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.-]+) ", line)):
                current = head[2]
                if head[1]:
                    self.entry = current
            elif found := LINE.match(line):
                results = tuple((dtype, _numbers(shape)) for dtype, shape in ARRAY.findall(found["result"]))
                self.computations[current].append(Instruction(found["name"], found["kind"], results, found["rest"]))
        self.shapes = {x.name: x.shapes for lines in self.computations.values() for x in lines}

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        """Every instruction that runs, with how often it does."""
        return list(self._run(self.entry, 1))

    def flops(self) -> float:
        """Return the FLOPs of all matrix products of one device."""
        return sum(x.times * self._product(x) for x in self.instructions if x.kind in ("dot", "convolution"))

    def carried(self) -> list[Shape]:
        """Return the shapes of the arrays that loops carry on one device."""
        return [shape for x in self.instructions if x.kind == "while" for shape in x.shapes if shape]

    def exchanged(self, sizes: Shape, axis: int) -> list[Exchange]:
        """Return each exchange between devices that differ in one axis, by its place, of a mesh with these sizes."""
        found = [x for x in self.instructions if x.kind.removesuffix("-start") in COLLECTIVES]
        between = [x for x in found if _differ(_groups(x.rest), sizes, axis)]
        return [Exchange(x.kind.removesuffix("-start"), *result) for x in between for result in x.results]

    def _run(self, computation: str, times: int) -> Iterator[Instruction]:
        for x in self.computations[computation]:
            yield dataclasses.replace(x, times=times)
            inner = times * (x.trips if x.kind == "while" else 1)
            for one, several in CALLED.findall(x.rest):
                for called in [one] if one else re.findall(r"[\w.-]+", several):
                    yield from self._run(called, inner)

    def _product(self, x: Instruction) -> float:
        [result], [left], [right] = x.shapes, *(self.shapes[name] for name in x.operands[:2])
        if x.kind == "convolution":  # each result sums over a kernel without the dimension of its outputs
            outputs = right[re.search(r"dim_labels=\w+_(\w+)->", x.rest)[1].index("o")]
            return 2 * math.prod(result) * math.prod(right) / outputs
        return 2 * math.prod(result) * math.prod(left[i] for i in x.attribute("lhs_contracting_dims"))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))


def _groups(rest: str) -> np.ndarray:
    """Return which devices exchange with each other, a row for each group, from any form in which XLA writes it."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", rest):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, sizes, order = (_numbers(x or "") for x in found.groups())
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order or None).reshape(shape)
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    assert found, f"no groups of devices in {rest[:200]}"
    return _groups_of_axes(dict(_named(found[1])), found[2])


def _groups_of_axes(mesh: dict[str, int], text: str) -> np.ndarray:
    """Return the groups of "'fsdp', 'data':(2)4" over a mesh: of an axis in parts those of 4 after a part of 2."""
    parts: dict[str, list[tuple[int, bool]]] = {name: [(size, False)] for name, size in mesh.items()}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", text):
        first, taken = (int(before), int(size)) if size else (1, mesh[name])
        parts[name] = [(first, False), (taken, True), (mesh[name] // (first * taken), False)]
    cut = list(itertools.chain(*parts.values()))
    devices = np.arange(math.prod(mesh.values())).reshape([size for size, _ in cut])
    order = sorted(range(len(cut)), key=lambda i: cut[i][1])
    return devices.transpose(order).reshape(-1, math.prod(size for size, taken in cut if taken))


def _named(text: str) -> Iterator[tuple[str, int]]:
    return ((name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", text))


def _differ(groups: np.ndarray, sizes: Shape, axis: int) -> bool:
    """Return whether devices of one group lie at different places of an axis of a mesh with these sizes."""
    places = np.unravel_index(groups, sizes)[axis]
    return bool((places != places[:, :1]).any())

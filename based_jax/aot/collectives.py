"""What devices exchange in a compiled program: which array, over which axes of the mesh, how many bytes, how often."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from based_jax.aot.hlo import ArrayType, Instruction, Program, numbers

SCATTERED_REDUCTION = "all-reduce-scatter"
"""How fused computations are called in which a TPU reduces and scatters at once."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `hlo.COLLECTIVES`.
      operands, results: arrays that each device gives, and gets.
      times: how often it runs.
      groups: partitions that exchange with each other, a row for each group; of a permutation a pair each.
      scope: where in the traced program it comes from.
    """

    kind: str
    operands: tuple[ArrayType, ...]
    results: tuple[ArrayType, ...]
    times: int
    groups: np.ndarray
    scope: str = ""

    @property
    def given_bytes(self) -> float:
        """The bytes of the arrays that a device gives, each time."""
        return sum(x.bytes for x in self.operands)

    def axes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return along which axes of a mesh with these sizes the devices of a group differ."""
        places = np.stack(np.unravel_index(self.groups, tuple(sizes)))
        return tuple(int(i) for i in np.flatnonzero((places != places[:, :, :1]).any(axis=(1, 2))))

    def sent_bytes(self, members: int, given: float | None = None) -> float:
        """Return the bytes that a device of a group with so many members sends each time, at the least."""
        given, others = self.given_bytes if given is None else given, members - 1
        if self.kind == "all-gather":
            return given * others
        if self.kind == "all-reduce":
            return 2 * given * others / members
        if self.kind in ("collective-permute", "collective-broadcast"):
            return given if others else 0.0
        return given * others / members


def collectives(program: Program) -> list[Collective]:
    """Return the collective operations of a program, one in pieces of a fused computation once."""
    return list(_found(program))


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind over the same axes: how often they run, and what a device sends in all of them."""

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float


def by_axis(found: Sequence[Collective], mesh: Mesh) -> list[Moved]:
    """Return the collectives by kind and axes, those with most bytes first; what no device sends is left out."""
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for x in found:
        axes = tuple(mesh.axis_names[i] for i in x.axes(mesh.devices.shape))
        totals[x.kind, axes][0] += x.times
        totals[x.kind, axes][1] += x.times * x.sent_bytes(x.groups.shape[1])
    moved = [Moved(kind, axes, int(count), sent) for (kind, axes), (count, sent) in totals.items() if axes]
    return sorted(moved, key=lambda x: -x.bytes)


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """An array, as "bf16[8,2048]", that a device gets of collectives of one kind over the same axes, and how often."""

    kind: str
    axes: tuple[str, ...]
    array: str
    count: int


def by_array(found: Sequence[Collective], mesh: Mesh) -> list[Exchanged]:
    """Return the arrays of the collectives by kind, axes and type; those that no device sends are left out."""
    counts: collections.Counter[tuple[str, tuple[str, ...], str]] = collections.Counter()
    for x in found:
        axes = tuple(mesh.axis_names[i] for i in x.axes(mesh.devices.shape))
        for array in x.results if axes else ():
            counts[x.kind, axes, str(array)] += x.times
    return [Exchanged(*key, count) for key, count in sorted(counts.items())]


def _found(program: Program) -> Iterator[Collective]:
    seen: set[str | None] = set()
    for x, times, fusion in program.runs:
        kind = x.collective
        if kind is None or (x.chain is not None and x.chain in seen):
            continue
        seen.add(x.chain)
        if fusion is not None and fusion.startswith(SCATTERED_REDUCTION):
            kind = "reduce-scatter"
        yield of_instruction(program, x, kind, times)


def of_instruction(program: Program, x: Instruction, kind: str, times: int = 1) -> Collective:
    """Return what an instruction exchanges that is, or begins, a collective of a kind."""
    operands = tuple(program.operands(x))
    return Collective(kind, operands, _got(x, len(operands)), times, _groups(x), x.scope)


def _got(x: Instruction, operands: int) -> tuple[ArrayType, ...]:
    """Return what each device gets: one that only begins says first what it takes, and may add a context."""
    is_begun = x.kind.endswith("-start") and len(x.results) >= 2 * operands
    return x.results[operands : 2 * operands] if is_begun else x.results


def _groups(x: Instruction) -> np.ndarray:
    """Return which devices exchange with each other, a row for each group, from any form in which XLA writes it."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", x.rest):
        return np.array([numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", x.rest):
        shape, sizes, order = (numbers(part or "") for part in found.groups())
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order or None).reshape(shape)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", x.rest):
        return _groups_of_axes(dict(_named(found[1])), found[2])
    return np.zeros((1, 1), int)


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

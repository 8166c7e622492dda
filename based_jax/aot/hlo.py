"""The text of a compiled program (`jax.stages.Compiled.as_text()`) as data: what runs, how often, on which arrays.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; here an instruction knows how often.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

Shape = tuple[int, ...]

ELEMENT_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
"""Of the types whose name does not end in their bits; those of 8-bit floats begin with theirs."""

ARRAY = re.compile(
    r"\b(?P<dtype>pred|bf16|token|opaque|c64|c128|[suf]\d+\w*)\[(?P<shape>[\d,]*)\](?P<layout>\{[^{}]*\})?"
)
LINE = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<result>\(.*?\)|\S+) (?P<kind>[a-z][\w-]*)\((?P<rest>.*)$"
)
HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
CALLED = re.compile(r"\b(?:body|condition|calls|to_apply)=%?([\w.-]+)|\bbranch_computations=\{([^}]*)\}")
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
FUSION, ASYNCHRONOUS_FUSION = FUSIONS = "fusion", "fusion-start"
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
NEVER_ENTERED = re.compile(r"-(?:done|update)$")
"""Kinds that name what another instruction has called already."""


class ArrayType(NamedTuple):
    """An array's type: `minor_to_major` and `tile` say how it is laid out, `space` where; 0 is the main memory."""

    dtype: str
    shape: Shape
    minor_to_major: Shape = ()
    tile: Shape = ()
    space: int = 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def element_bits(self) -> int:
        """The bits of an element."""
        found = ELEMENT_BITS.get(self.dtype)
        return int(re.search(r"\d+", self.dtype)[0]) if found is None else found  # type: ignore[index]

    @property
    def bytes(self) -> float:
        """Its elements."""
        return math.prod(self.shape) * self.element_bits / 8

    @property
    def padded_bytes(self) -> float:
        """What it takes in memory, where its last dimensions are filled up to whole tiles."""
        sizes = [self.shape[i] for i in reversed(self.minor_to_major)] if self.minor_to_major else list(self.shape)
        for i, tile in enumerate(reversed(self.tile[-len(sizes) :] if sizes else ()), 1):
            sizes[-i] = -(-sizes[-i] // tile) * tile
        return math.prod(sizes) * self.element_bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program's text; `rest` is what follows its kind's opening bracket."""

    name: str
    kind: str
    results: tuple[ArrayType, ...]
    rest: str
    is_root: bool = False

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of its results."""
        return tuple(result.shape for result in self.results)

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of what it takes."""
        return re.findall(r"%([\w.-]+)", self.rest[: _closing_bracket(self.rest)])

    @property
    def called(self) -> list[str]:
        """The computations that run when it does."""
        if NEVER_ENTERED.search(self.kind):
            return []
        found = [[one] if one else re.findall(r"[\w.-]+", several) for one, several in CALLED.findall(self.rest)]
        return [name for names in found for name in names]

    def numbers(self, attribute: str) -> Shape:
        """Return an attribute that is a list of numbers, empty where there is none."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.rest)
        return numbers(found[1]) if found else ()

    def word(self, attribute: str) -> str | None:
        """Return an attribute that is a word or a number, or None."""
        found = re.search(rf"\b{attribute}=\"?([\w>.-]+)", self.rest)
        return found[1] if found else None

    @property
    def collective(self) -> str | None:
        """The kind of collective that it is or begins, one of `COLLECTIVES`, or None."""
        kind = self.kind.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def chain(self) -> str | None:
        """What the pieces of one asynchronous collective have in common, in fusions that go on with it; else None."""
        found = self.word("chain_id") if self.collective else None
        return None if found is None else f"{found}/{self.word('channel_id')}"

    @property
    def scope(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Run(NamedTuple):
    """An instruction that runs, how often, and in which fused computation; None where it stands by itself."""

    instruction: Instruction
    times: int
    fusion: str | None


class Program:
    """A compiled program, one computation after the other.

    Attributes:
      computations: instructions by the name of their computation.
      entry: the computation that runs first.
      unknown_loops: names of loops whose text says not how often they run; they count as running once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = collections.defaultdict(list)
        self.unknown_loops: list[str] = []
        current = self.entry = ""
        for line in text.splitlines():
            if not line.startswith(" ") and (head := HEAD.match(line)):
                current = head["name"]
                self.entry = current if head["entry"] else self.entry
            elif current and (found := LINE.match(line)):
                self.computations[current].append(_instruction(found))
        self.by_name = {x.name: x for lines in self.computations.values() for x in lines}

    @functools.cached_property
    def runs(self) -> list[Run]:
        """Every instruction that runs, those of fused computations too."""
        return list(self._run(self.entry, 1, None))

    @property
    def instructions(self) -> list[Instruction]:
        """What runs, each instruction once."""
        return [run.instruction for run in self.runs]

    def launches(self, computation: str | None = None) -> Iterator[Instruction]:
        """Yield what runs in the order of its schedule, the body of a loop again and again; a fusion is one of these.

        Of a fusion that moves what a kernel takes or makes it is the kernel.
        """
        for x in self.computations[self.entry if computation is None else computation]:
            if x.kind in FUSIONS:
                yield self._kernel_within(x) or x
                continue
            yield x
            for _ in range(self.trips(x) if x.kind == "while" else 1):
                for called in x.called:
                    yield from self.launches(called)

    def _kernel_within(self, fusion: Instruction) -> Instruction | None:
        fused = [x for name in fusion.called for x in self.computations.get(name, ())]
        return next((x for x in fused if x.kind == "custom-call"), None)

    @functools.cached_property
    def scopes(self) -> dict[str, str]:
        """Where in the traced program each instruction comes from: what it says, what it fuses, or what takes it."""
        found: dict[str, str] = {}
        for lines in self.computations.values():
            taken: dict[str, str] = {}
            for x in reversed(lines):
                found[x.name] = scope = self._own_scope(x) or taken.get(x.name, "")
                taken.update(dict.fromkeys(x.operands if scope else (), scope))
        return found

    def _own_scope(self, x: Instruction) -> str:
        fused = [y for name in x.called for y in self.computations.get(name, ())] if x.kind in FUSIONS else []
        return next((y.scope for y in (x, *reversed(fused)) if y.scope), "")

    def operands(self, x: Instruction) -> list[ArrayType]:
        """Return the types of what an instruction takes."""
        return [result for name in x.operands if name in self.by_name for result in self.by_name[name].results]

    def root(self, computation: str) -> Instruction:
        """Return what a computation results in."""
        return next(x for x in self.computations[computation] if x.is_root)

    def _run(self, computation: str, times: int, fusion: str | None) -> Iterator[Run]:
        for x in self.computations[computation]:
            yield Run(x, times, fusion)
            inner = times * (self.trips(x) if x.kind == "while" else 1)
            for called in x.called:
                yield from self._run(called, inner, called if x.kind in FUSIONS else fusion)

    def trips(self, loop: Instruction) -> int:
        """Return how often a loop runs: what it says itself, or the bound of its counter."""
        if known := KNOWN_TRIPS.search(loop.rest):
            return int(known[1])
        condition = re.search(r"\bcondition=%?([\w.-]+)", loop.rest)
        bound = self._bound(condition[1]) if condition else None
        if bound is None:
            self.unknown_loops.append(loop.name)
        return 1 if bound is None else bound

    def _bound(self, condition: str) -> int | None:
        """Return the bound of a counter from 0 by steps of 1, as `lax.scan` counts, of a loop's condition."""
        lines = [x for name in self._within(condition) for x in self.computations[name]]
        compared = [x for x in lines if x.kind == "compare" and x.word("direction") in ("LT", "GT", "NE")]
        constants = [x for x in lines if x.kind == "constant" and not x.results[0].shape]
        bounds = [int(x.rest.split(")")[0]) for x in constants if x.results[0].dtype[0] in "su"]
        return bounds[0] if len(compared) == len(bounds) == 1 else None

    def _within(self, computation: str) -> list[str]:
        """Return a computation and those that it calls."""
        called = [name for x in self.computations[computation] for name in x.called]
        return [computation, *(inner for name in called for inner in self._within(name))]


def numbers(text: str) -> Shape:
    """Return the numbers of "1,2,3"."""
    return tuple(map(int, filter(None, text.split(","))))


def _instruction(found: re.Match) -> Instruction:
    results = tuple(map(_array, ARRAY.finditer(found["result"])))
    return Instruction(found["name"], found["kind"], results, found["rest"], found["root"] is not None)


def _array(found: re.Match) -> ArrayType:
    layout = found["layout"] or ""
    order, tile, space = (re.search(p, layout) for p in (r"^\{([\d,]+)", r"T\(([\d,]+)\)", r"S\((\d+)\)"))
    return ArrayType(
        found["dtype"],
        numbers(found["shape"]),
        numbers(order[1]) if order else (),
        numbers(tile[1]) if tile else (),
        int(space[1]) if space else 0,
    )


def _closing_bracket(text: str) -> int:
    """Return where the bracket closes that was open before the text."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)

"""Where the time of a step on the device goes, one of training or of decoding: by layer and operation, copies and gaps.

From JAX's profiler. A program is a step, or several of them, as decoding has a block of tokens.
"""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from based_jax.aot import costs
from based_jax.aot.hlo import FUSIONS, Instruction, Program
from based_jax.bench import exchange
from based_jax.bench.launches import LIBRARY_KERNELS, instructions
from based_jax.bench.timing import Kernel, busy_time, in_order, length, recorded

COPIES = "copy", "copy-start", "dynamic-slice", "dynamic-update-slice"
"""Kinds of instructions that do nothing but move."""
COPY_KERNEL = re.compile(r"(?i)mem(cpy|set)")
PRODUCT_KERNEL = re.compile(r"(?i)nvjet|gemm|gemv|cublas|cutlass|xmma|splitk")
"""Those that XLA makes of products count among these, too."""
COLLECTIVES = "collectives"
"""The sort of kernels by which GPUs exchange, and in place of their layer: other layers' kernels run beside them."""
KERNELS_SHOWN = 20
MODULE = re.compile(r'\b(?:module|ir) = "(?:[^"\\]|\\.)*"')
"""The program of a kernel of our own within the text of one that calls it: half a megabyte each time."""


class Part(NamedTuple):
    """One launch: pass, layer and operation that it works for, kernel and its sort, time; "" where there is none."""

    which: str
    layer: str
    operation: str
    kernel: str
    sort: str
    milliseconds: float

    @property
    def place(self) -> str:
        """What it works for, in words: backward mlp/project."""
        return " ".join(filter(None, (self.which, "/".join(filter(None, (self.layer, self.operation))))))


def program_of(text: str) -> Program:
    """Return a compiled program from its text."""
    return Program(MODULE.sub("", text))


def profile(run: Callable[[int], Any], program: Program, runs: int, steps_per_run: int = 1) -> dict[str, Any] | None:
    """Return the breakdown of `run(runs)` on the first GPU of this process; None where no kernel is recorded."""
    kernels = recorded(lambda: run(runs))
    first = min((kernel.device for kernel in kernels), default=0)
    own = [kernel for kernel in kernels if kernel.device == first]
    return breakdown(own, program, runs, steps_per_run) if own else None


def breakdown(kernels: Sequence[Kernel], program: Program, runs: int, steps_per_run: int = 1) -> dict[str, Any]:
    """Return where the milliseconds of a step go.

    The result has "milliseconds" from the first kernel to the last, and of a step in "each_run", where all have as many
    kernels: a GPU that has paused is faster at first. In it "idle", in which none ran, "launches" of kernels, "copies"
    by instructions and engines that only move, "layers" by kind and pass, "sorts" of kernels, and of "kernels" those
    that take most. Where GPUs exchange something there is "exchange" (`exchange.exchanged`), in no layer.
    """
    ordered, steps = in_order(kernels), runs * steps_per_run
    told = instructions(ordered, program, steps if has_unknown_loops(program) else runs)
    parts = [_part(kernel, program, found, steps) for kernel, found in zip(ordered, told, strict=True)]
    moved = exchange.exchanged(ordered, steps)
    span, busy = (x(ordered) / 1e6 / steps for x in (length, busy_time))
    return {
        "milliseconds": round(span, 3),
        "each_run": _each_run(ordered, runs, steps_per_run),
        "idle": round(span - busy, 3),
        "launches": round(len(kernels) / steps, 1),
        "copies": _sum(part.milliseconds for part in parts if part.layer == "copies"),
        "layers": _by_layer(parts),
        "sorts": _by_sort(parts),
        "kernels": _most(parts, steps),
        **({"exchange": moved} if moved["kinds"] else {}),
    }


def _each_run(ordered: Sequence[Kernel], runs: int, steps_per_run: int) -> list[float]:
    count, rest = divmod(len(ordered), runs)
    groups = [] if rest else [ordered[i * count : (i + 1) * count] for i in range(runs)]
    return [round(length(group) / 1e6 / steps_per_run, 3) for group in groups]


def has_unknown_loops(program: Program) -> bool:
    """Return whether a loop does not say how often it runs: its body is a step, and stands once in the schedule."""
    return bool(program.runs and program.unknown_loops)


def _part(kernel: Kernel, program: Program, found: Instruction | None, steps: int) -> Part:
    milliseconds = (kernel.end - kernel.start) / 1e6 / steps
    if (kind := exchange.kind(kernel)) is not None:
        return Part("", COLLECTIVES, kind, kernel.name, COLLECTIVES, milliseconds)
    return Part(*place(program, found, kernel.name), kernel.name, sort(found, kernel.name), milliseconds)


def place(program: Program, instruction: Instruction | None, kernel: str) -> tuple[str, str, str]:
    """Return the pass, layer and operation that a kernel works for, as far as its instruction tells."""
    if COPY_KERNEL.search(kernel) or (instruction is not None and instruction.kind in COPIES):
        return "", "copies", kernel if instruction is None else instruction.kind
    if instruction is None:
        return "", "unknown", kernel
    which, _, path = costs.place_of(program, instruction).partition(" ")
    layer, _, operation = path.partition("/")
    return (which, layer, operation) if layer else ("", "others", which)


def sort(instruction: Instruction | None, kernel: str) -> str:
    """Return what runs a kernel: cudnn, products by whomever, copies, XLA's other fusions, or kernels of our own."""
    if LIBRARY_KERNELS["cudnn"].search(kernel):
        return "cudnn"
    if PRODUCT_KERNEL.search(kernel):
        return "products"
    if COPY_KERNEL.search(kernel) or (instruction is not None and instruction.kind in COPIES):
        return "copies"
    if instruction is None:
        return "unknown"
    return "fusions" if instruction.kind in FUSIONS else "kernels"


def _by_sort(parts: Sequence[Part]) -> dict[str, float]:
    """Return the milliseconds by sort of kernel, the most first."""
    total: dict[str, float] = collections.defaultdict(float)
    for part in parts:
        total[part.sort] += part.milliseconds
    return {name: round(x, 3) for name, x in sorted(total.items(), key=lambda item: -item[1])}


def _by_layer(parts: Sequence[Part]) -> dict[str, dict[str, float]]:
    """Return the milliseconds by kind of layer and by pass, the most first."""
    total: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for part in parts:
        total[part.layer][part.which or "all"] += part.milliseconds
    ordered = sorted(total.items(), key=lambda item: -sum(item[1].values()))
    return {layer: {which: round(x, 3) for which, x in passes.items()} for layer, passes in ordered}


def _most(parts: Sequence[Part], steps: int) -> list[dict[str, Any]]:
    """Return the kernels that take most in a step, with what they work for."""
    total: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for part in parts:
        total[part.kernel, part.place].append(part.milliseconds)
    most = sorted(total.items(), key=lambda item: -sum(item[1]))[:KERNELS_SHOWN]
    return [
        {"kernel": kernel, "place": where, "launches": round(len(times) / steps, 1), "milliseconds": _sum(times)}
        for (kernel, where), times in most
    ]


def _sum(times: Any) -> float:
    return round(sum(times), 3)


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return a breakdown in lines of print."""
    head = (
        f"{found['milliseconds']:.2f} ms on the device, idle {found['idle']:.2f}, copies {found['copies']:.2f}, "
        f"{found['launches']:.0f} launches"
    )
    layers = [
        f"  {layer:<16} {sum(passes.values()):8.2f} ms  "
        + ", ".join(f"{which} {time:.2f}" for which, time in passes.items())
        for layer, passes in found["layers"].items()
    ]
    sorts = "  " + ", ".join(f"{name} {time:.2f}" for name, time in found["sorts"].items())
    moved = [f"  {exchange.line(found['exchange'])}"] if "exchange" in found else []
    return [head, sorts, *moved, *layers]

"""Which instruction of a compiled program each recorded kernel is of.

A profile of a GPU may name kernels alone. Those of one name run in the order in which the program's schedule has its
instructions of that name; a library's kernels, which have names of their own, in that of the calls of the library.
"""

import collections
import re
from collections.abc import Sequence

from based_jax.aot import costs
from based_jax.aot.hlo import FUSIONS, Instruction, Program
from based_jax.bench.timing import Kernel

OWN_SUFFIX = "_mosaic_gpu_kernel"
OWN_PRIMITIVES = "mpmd_map", "pallas_call"
"""What the scope of a kernel of our own ends with, behind the kernel's name."""
HELPER = re.compile(r"(?i)splitk|memset|memcpy")
"""Of kernels that a library runs beside the one that was asked for."""
LIBRARY_KERNELS = {
    "cudnn backward": re.compile(r"(?i)(cudnn|fmha|sdpa|flash).*(bprop|bwd|backward|dot_do|convert)"),
    "cudnn": re.compile(r"(?i)cudnn|fmha|sdpa|flash"),
    "cublas": re.compile(r"(?i)nvjet|gemm|cublas|cutlass|xmma"),
}
"""By the library that runs them, tried in this order."""


def instructions(kernels: Sequence[Kernel], program: Program, steps: int) -> list[Instruction | None]:
    """Return the instruction of each kernel; None where it cannot be told.

    Args:
      kernels: of so many steps of the program, in the order of their starts.
      program: the step.
      steps: the runs that were recorded.
    """
    expected = collections.defaultdict(list)
    for x in program.launches():
        if (name := launch_name(x)) is not None:
            expected[name].append(x)
    names = [_name(kernel, expected) for kernel in kernels]
    counts, seen = collections.Counter(names), collections.Counter[str]()
    found: list[Instruction | None] = []
    for kernel, name in zip(kernels, names, strict=True):
        told = program.by_name.get(kernel.instruction or "")
        found.append(told or _nth(seen[name], counts[name], expected.get(name, ()), steps))
        seen[name] += 1
    return found


def launch_name(x: Instruction) -> str | None:
    """Return what the kernels of an instruction are found by; None where it launches none of its own."""
    if x.kind in FUSIONS or x.kind == "copy":
        return re.sub(r"\W", "_", x.word("deduplicated_name") or x.name)
    if x.kind != "custom-call":
        return None
    target = re.search(r'custom_call_target="([^"]*)"', x.rest)
    if target and (library := re.match(r"__(cublas|cudnn)", target[1])):
        return library[1] + (" backward" if "Backward" in target[1] else "")
    path = [part for part in x.scope.split("/") if part not in OWN_PRIMITIVES]
    return path[-1] if path else None


def _name(kernel: Kernel, expected: dict[str, list[Instruction]]) -> str:
    """Return what a kernel is found by: its name, if the program has one of that name, else its library's."""
    name = kernel.name.removesuffix(OWN_SUFFIX)
    if name in expected or HELPER.search(name):
        return name
    return next((library for library, pattern in LIBRARY_KERNELS.items() if pattern.search(name)), name)


def _nth(number: int, count: int, expected: Sequence[Instruction], steps: int) -> Instruction | None:
    """Return the instruction of one of `count` kernels of a name; each launches as many, or all are of one place."""
    if not expected:
        return None
    each, rest = divmod(count, steps * len(expected))
    if each and not rest:
        return expected[number // each % len(expected)]
    return expected[0] if len({costs.place_of(x) for x in expected}) == 1 else None

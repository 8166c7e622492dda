"""Which instruction of a compiled program each recorded kernel is of.

A profile of a GPU may name kernels alone. XLA calls a kernel as one of the instructions that share it; a library's
kernels have names of their own, and a call of it may run several or none. So the names are aligned with those of the
program's schedule (`alignment.py`).
"""

import collections
import re
from collections.abc import Sequence

from based_jax.aot import costs
from based_jax.aot.hlo import FUSIONS, Instruction, Program
from based_jax.bench.alignment import aligned
from based_jax.bench.timing import Kernel

OWN_SUFFIX = "_mosaic_gpu_kernel"
OWN_PRIMITIVES = "mpmd_map", "triton_kernel_call"
"""What the scope of a kernel of our own ends with, behind the kernel's name."""
WRAPPED = re.compile(r"wrapped_[a-z_]+")
"""Fusions of one operation, of which XLA does not say which share a kernel: those of one type do."""
HELPER = re.compile(r"(?i)splitk_?reduce|reduce_?splitk")
"""A kernel that a library runs after the one that was asked for."""
LIBRARY_KERNELS = {
    "cudnn backward": re.compile(r"(?i)(cudnn|fmha|sdpa|flash).*(bprop|bwd|backward|dot_do|convert)"),
    "cudnn": re.compile(r"(?i)cudnn|fmha|sdpa|flash"),
    "cublas": re.compile(r"(?i)nvjet|gemm(?!_fusion)|gemv|cublas|cutlass|xmma"),
    "nccl": re.compile(r"(?i)nccl"),
}
"""By the library that runs them, tried in this order."""


def instructions(kernels: Sequence[Kernel], program: Program, steps: int) -> list[Instruction | None]:
    """Return the instruction of each kernel; None where it cannot be told.

    Args:
      kernels: of so many steps of the program, in the order of their starts.
      program: the step.
      steps: the runs that were recorded.
    """
    schedule = Schedule(program)
    names = [schedule.name_of(kernel) for kernel in kernels]
    places = aligned(names, schedule.places, len(schedule.launches), steps)
    found: list[Instruction | None] = []
    called = None
    for kernel, name, place in zip(kernels, names, places, strict=True):
        if HELPER.search(kernel.name):
            found.append(called)
            continue
        found.append(schedule.told(kernel, name) if place is None else schedule.launches[place])
        called = found[-1] if name in LIBRARY_KERNELS else called
    return found


class Schedule:
    """What a program launches, in order.

    Attributes:
      launches: its instructions that run a kernel, as often as they do.
      places: the indices of those that go by one name.
    """

    def __init__(self, program: Program):
        self._program = program
        named = [(x, name) for x in program.launches() if (name := launch_name(x, program)) is not None]
        self.launches = [x for x, _ in named]
        self.places: dict[str, list[int]] = collections.defaultdict(list)
        for place, (x, name) in enumerate(named):
            self.places[name].append(place)
            self.places[_told(x.name)].append(place)
        self._shared = {_word(x.name): name for x, name in named if x.kind != "custom-call"}

    def name_of(self, kernel: Kernel) -> str | None:
        """Return the name of `places` that a kernel goes by; None where it goes by none."""
        if kernel.instruction and (told := _told(kernel.instruction)) in self.places:
            return told
        name = kernel.name.removesuffix(OWN_SUFFIX)
        if name in self._shared or name in self.places:
            return self._shared.get(name, name)
        return next((library for library, pattern in LIBRARY_KERNELS.items() if pattern.search(name)), None)

    def told(self, kernel: Kernel, name: str | None) -> Instruction | None:
        """Return what a kernel says that it is of, or one of its name if all of these work for the same part."""
        if kernel.instruction in self._program.by_name:
            return self._program.by_name[kernel.instruction]
        found = [self.launches[place] for place in self.places.get(name or "", ())]
        return found[0] if len({costs.place_of(self._program, x) for x in found}) == 1 else None


def launch_name(x: Instruction, program: Program) -> str | None:
    """Return what instructions that run the same kernel have in common; None where it runs none."""
    if x.kind in FUSIONS or x.kind == "copy":
        wrapped = WRAPPED.match(x.name)
        own = f"{wrapped[0]} {program.operands(x)} {x.results}" if wrapped else x.name
        return _word(x.word("deduplicated_name") or own)
    if x.collective:
        return "nccl"
    if x.kind != "custom-call":
        return None
    target = re.search(r'custom_call_target="([^"]*)"', x.rest)
    if target and (library := re.match(r"__(cublas|cudnn)", target[1])):
        return library[1] + (" backward" if "Backward" in target[1] else "")
    path = [part for part in x.scope.split("/") if part not in OWN_PRIMITIVES]
    return path[-1] if path else None


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _told(instruction: str) -> str:
    """Return the name of a launch by its instruction, which no kernel has."""
    return f"={instruction}"

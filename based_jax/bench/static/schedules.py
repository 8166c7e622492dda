"""What libtpu schedules for a kernel: bundles of instructions, one a cycle, of its body and of the loops in it."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from based_jax.ops.tpu.bundles import Loop, Schedule

BUNDLE = re.compile(r"^ *0x[0-9a-f]+ *(?:[A-Z]{2})? *: (>*)", re.MULTILINE)
"""A bundle's address, what its place is, and how deep it stands in loops; the outermost is that over programs."""
OUTERMOST = 1
UTILIZATION = "static-per-bundle-utilization"


def dump_into_a_folder() -> Path:
    """Return where libtpu writes its schedules; before it is loaded."""
    folder = tempfile.mkdtemp()
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    return Path(folder)


def empty(folder: Path) -> None:
    """Remove what was written of programs before."""
    for path in folder.iterdir():
        path.unlink()


def of_kernel(folder: Path, name: str) -> Schedule:
    """Return the schedule of the kernel with this name."""
    [path] = (x for x in folder.glob(f"*-{name}*-final_bundles.txt") if "schedule-analysis" not in x.name)
    return parsed(path.read_text())


def spills(folder: Path, name: str) -> int:
    """Return how many registers the bundles of programs with this in their name write to memory for want of others."""
    paths = (path for path in folder.glob(f"*-final_hlo-{UTILIZATION}.txt") if name in path.name)
    return sum(spills_of(path.read_text()) for path in paths)


def spills_of(text: str) -> int:
    """Return the sum of each bundle's spills: libtpu writes names, capacities, and below them a line a bundle."""
    words = [line.split() for line in text.replace(", ", " ").splitlines() if line.strip() and line[:2] != "=="]
    column = words[0].index("VSTORE:SPILL")
    return sum(int(line[column]) for line in words[2:])


def parsed(text: str) -> Schedule:
    """Return the schedule that libtpu wrote."""
    depths = [len(marks) for marks in BUNDLE.findall(text)]
    return Schedule(sum(depth <= OUTERMOST for depth in depths), list(_loops(depths)))


def _loops(depths: list[int]) -> Iterator[Loop]:
    own = inner = 0
    for depth in [*depths, 0]:
        if depth > OUTERMOST:
            own, inner = own + (depth == OUTERMOST + 1), inner + (depth > OUTERMOST + 1)
        elif own or inner:
            yield Loop(own, inner)
            own = inner = 0

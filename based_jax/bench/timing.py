"""Time on the device, from the profiler's record of every kernel."""

import glob
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from based_jax import devices
from based_jax.bench.defaults import REPEATS

MOST_SECONDS = 1.5
"""Of repeating one call..."""
FEWEST_CALLS = 3
"""...but for this many."""
GPU_PLANE = re.compile(r"/device:GPU:(\d+)")


class Kernel(NamedTuple):
    """One launch: its name, when it ran, in nanoseconds, the instruction of the program that it is of, if told, and the
    GPU that it ran on, by its number in this process.
    """

    name: str
    start: float
    end: float
    instruction: str | None = None
    device: int = 0


class Breakdown(NamedTuple):
    """Where one call's time on the device goes, in microseconds, medians over calls.

    Attributes:
      span: from the first kernel's start to the last one's end.
      idle: the part of it in which no kernel ran.
      kernels: (name, launches in a call, their time together), in the order in which they first start.
    """

    span: float
    idle: float
    kernels: list[tuple[str, int, float]]


def device_microseconds(call: Callable, inputs: Sequence[tuple], repeats: int = REPEATS) -> float:
    """Return the median time of `call(*inputs[i])` in microseconds, from its first kernel's start to its last's end.

    `call` is compiled; successive calls take the next inputs, so that several sets keep the caches cold. Gaps between
    the kernels of a call count, the host's time before it does not. Slow calls are repeated less (`affordable`).

    Raises:
      RuntimeError: the profiler recorded no kernels, or not the same number for each call.
    """
    return span(*_traced(call, inputs, repeats))


def breakdown(call: Callable, inputs: Sequence[tuple], repeats: int = REPEATS) -> Breakdown:
    """Return where the time of `call(*inputs[i])` goes; arguments and errors as for `device_microseconds`."""
    return parts(*_traced(call, inputs, repeats))


def affordable(repeats: int, seconds: float) -> int:
    """Return how often to repeat a call of so many seconds."""
    return max(min(FEWEST_CALLS, repeats), min(repeats, int(MOST_SECONDS / max(seconds, 1e-9))))


def sets_past_cache(size: int, repeats: int, device_kind: str) -> int:
    """Return how many sets of inputs of so many bytes to rotate, so that each call finds the L2 cache cold."""
    return min(max(repeats, 2), 2 + 2 * devices.l2_bytes(device_kind) // size)


def span(kernels: Sequence[Kernel], calls: int) -> float:
    """Return the median over equal calls of the time from first start to last end, in microseconds."""
    return statistics.median(length(group) for group in _groups(kernels, calls)) / 1e3


def parts(kernels: Sequence[Kernel], calls: int) -> Breakdown:
    """Return the breakdown of equal calls."""
    groups = _groups(kernels, calls)
    names = dict.fromkeys(kernel.name for group in groups for kernel in group)

    def total(group: Sequence[Kernel], name: str) -> float:
        return sum(kernel.end - kernel.start for kernel in group if kernel.name == name)

    rows = []
    for name in names:
        launches = sum(kernel.name == name for group in groups for kernel in group)
        rows.append((name, round(launches / calls), statistics.median(total(group, name) for group in groups) / 1e3))
    idle = statistics.median(length(group) - busy_time(group) for group in groups) / 1e3
    return Breakdown(span(kernels, calls), idle, rows)


def _groups(kernels: Sequence[Kernel], calls: int) -> list[list[Kernel]]:
    each = len(kernels) // calls
    if not each or each * calls != len(kernels):
        raise RuntimeError(f"The profiler recorded {len(kernels)} kernels in {calls} equal calls.")
    ordered = in_order(kernels)
    return [ordered[i : i + each] for i in range(0, len(ordered), each)]


def in_order(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Return kernels in the order of their starts."""
    return sorted(kernels, key=lambda kernel: kernel[1:3])


def length(group: Sequence[Kernel]) -> float:
    """Return the time from the first start to the last end, given kernels in the order of their starts."""
    return max(kernel.end for kernel in group) - group[0].start


def busy_time(group: Sequence[Kernel]) -> float:
    """Return the time in which at least one kernel ran, given them in the order of their starts."""
    busy, until = 0.0, -math.inf
    for kernel in group:
        busy += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return busy


def _traced(call: Callable, inputs: Sequence[tuple], repeats: int) -> tuple[list[Kernel], int]:
    """Return the kernels of repeated calls, and how many calls these were."""
    for arguments in inputs:
        begin = time.perf_counter()
        jax.block_until_ready(call(*arguments))
    calls = affordable(repeats, time.perf_counter() - begin)

    def run() -> None:
        for i in range(calls):
            jax.block_until_ready(call(*inputs[i % len(inputs)]))

    return recorded(run), calls


def recorded(run: Callable[[], None]) -> list[Kernel]:
    """Return the kernels that ran on the GPUs of this process while `run` did."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        return _kernels(folder)


def _kernels(folder: str) -> list[Kernel]:
    [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    planes = jax.profiler.ProfileData.from_file(path).planes
    gpus = [(int(found[1]), plane) for plane in planes if (found := GPU_PLANE.match(plane.name))]
    streams = [(gpu, line) for gpu, plane in gpus for line in plane.lines if line.name.startswith("Stream")]
    return [_kernel(event, gpu) for gpu, line in streams for event in line.events]


def _kernel(event: Any, gpu: int) -> Kernel:
    told = dict(event.stats).get("hlo_op")
    instruction = None if told is None else str(told)
    return Kernel(event.name, event.start_ns, event.start_ns + event.duration_ns, instruction, gpu)

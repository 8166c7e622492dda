"""Time on the device, from the profiler's record of every kernel."""

import glob
import statistics
import tempfile
from collections.abc import Callable, Sequence

import jax

REPEATS = 20


def device_microseconds(call: Callable, inputs: Sequence[tuple], repeats: int = REPEATS) -> float:
    """Return the median time of `call(*inputs[i])` in microseconds, from its first kernel's start to its last's end.

    `call` is compiled; successive calls take the next inputs, so that several sets keep the caches cold. Gaps between
    the kernels of a call count, the host's time before it does not.

    Raises:
      RuntimeError: the profiler recorded no kernels, or not the same number for each call.
    """
    for arguments in inputs:
        jax.block_until_ready(call(*arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(repeats):
                jax.block_until_ready(call(*inputs[i % len(inputs)]))
        kernels = _kernels(folder)
    return span(kernels, repeats)


def span(kernels: Sequence[tuple[float, float]], calls: int) -> float:
    """Return the median over equal calls of the time from first start to last end, given (start, end) in ns, as us."""
    each = len(kernels) // calls
    if not each or each * calls != len(kernels):
        raise RuntimeError(f"The profiler recorded {len(kernels)} kernels in {calls} equal calls.")
    ordered = sorted(kernels)
    groups = [ordered[i : i + each] for i in range(0, len(ordered), each)]
    return statistics.median(max(end for _, end in group) - group[0][0] for group in groups) / 1e3


def _kernels(folder: str) -> list[tuple[float, float]]:
    [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    planes = jax.profiler.ProfileData.from_file(path).planes
    lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
    events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    return [(event.start_ns, event.start_ns + event.duration_ns) for event in events]

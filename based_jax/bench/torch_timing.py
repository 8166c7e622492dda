"""Time on the device of PyTorch's calls."""

import itertools
import statistics
from collections.abc import Callable

UNTIMED_STEPS = 3


def median_seconds(step: Callable[[], object], steps: int, untimed: int = UNTIMED_STEPS) -> float:
    """Return the median time of a step between events on the device, which never waits for the host."""
    import torch

    for _ in range(untimed):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(events)) / 1e3

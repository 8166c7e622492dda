"""One compiled program again and again, timed while the device never waits for the host."""

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

UNTIMED_STEPS = 3
"""Before those that are timed."""


class Runner:
    """Steps one after the other, from a state that each of them replaces."""

    def __init__(self, step: Any, state: Any, batches: Sequence[Any]):
        self.step, self.state, self.batches = step, state, batches

    def take(self, steps: int) -> list[float]:
        """Take steps, and return when each was done, in seconds; the next one always waits on the device."""
        done, last = [], None
        for i in range(steps):
            self.state, metrics = self.step(self.state, self.batches[i % len(self.batches)])
            if last is not None:
                jax.block_until_ready(last)
                done.append(time.perf_counter())
            last = metrics
        jax.block_until_ready(last)
        return [*done, time.perf_counter()]

    def median_seconds(self, steps: int, untimed: int = UNTIMED_STEPS) -> float:
        """Return the median time of so many steps, after at least one that is not timed."""
        done = self.take(untimed + steps)[untimed - 1 :]
        return statistics.median(end - begin for begin, end in itertools.pairwise(done))

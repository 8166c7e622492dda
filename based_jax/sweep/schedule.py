"""What of a sweep is left to do: groups of points, each taken once by whoever asks first."""

import dataclasses
import functools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

from based_jax.store import Store
from based_jax.sweep.lane_training import MAX_COMPILER_THREADS, MAX_LANES
from based_jax.sweep.points import Point
from based_jax.sweep.rows import describe
from based_jax.sweep.trial import Sweep

Group = list[tuple[Point, Any]]
"""Points that train together, with their `Sweep.config_class`."""


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run; nothing here changes a number of a row but its times.

    Attributes:
      max_lanes: trials trained together, at most.
      workers: threads that train groups on each device, or whole runs, at a time; None for what suits the engine.
      compiler_threads: programs that a group compiles at the same time.
      part: (i, n) to take every n-th group from the i-th on (`Todo`).
      command: what the rows name as their command.
    """

    max_lanes: int = MAX_LANES
    workers: int | None = None
    compiler_threads: int = MAX_COMPILER_THREADS
    part: tuple[int, int] = (0, 1)
    command: str = ""


class Todo:
    """The groups that have points without a row, each taken once, by whichever thread or process asks first.

    Processes that are forked after share it. It makes no use of a device before groups are asked for.

    Args:
      all_groups: returns the groups of the whole sweep, the same and in the same order in every process.
      store: of the rows.
      part: (i, n) to take every n-th group from the i-th on.
    """

    def __init__(self, all_groups: Callable[[], list[Group]], store: Store, part: tuple[int, int] = (0, 1)):
        self._all_groups, self._part, self._finished = all_groups, part, store.ids()
        self._taken, self._done = (multiprocessing.Value("i", 0) for _ in range(2))

    @functools.cached_property
    def groups(self) -> list[Group]:
        """All groups of this part."""
        first, step = self._part
        # Cut before anything is left out: parts that start at different times find different rows in the store.
        mine = self._all_groups()[first::step]
        return [left for group in mine if (left := [x for x in group if x[1].id not in self._finished])]

    def take(self) -> Group | None:
        """Return the first group that nobody has taken, or None."""
        with self._taken:
            place, self._taken.value = self._taken.value, self._taken.value + 1
        return self.groups[place] if place < len(self.groups) else None

    def count(self) -> int:
        """Count a point that is done; return how many are, in all processes."""
        with self._done:
            self._done.value += 1
            return self._done.value


class Engine(Protocol):
    """A way to train points: which of them are trained together, and how a group is."""

    def groups(self, sweep: Sweep) -> list[Group]:
        """Return all points in groups, the same in every process."""
        ...

    def prepare(self, sweep: Sweep, starmap: Callable) -> None:
        """Make what all processes share that are forked after, by `starmap`."""
        ...

    def train(self, progress: "Progress", name: str, options: SweepOptions) -> None:
        """Train groups until none is left, each point with a row under the sweep's name; errors as of `work_off`."""
        ...


class Progress:
    """Keeps the rows of what is done, counts it and what failed, says so, and knows whether to go on."""

    def __init__(self, todo: Todo, store: Store, report: Callable[[str], None]):
        self.todo, self.store = todo, store
        self.count, self.stopped = 0, False
        self.errors: list[str] = []
        self._report, self._lock = report, threading.Lock()
        self._total, self._begin = sum(map(len, todo.groups)), time.perf_counter()

    def finish(self, row: Mapping[str, Any], text: str) -> None:
        """Store the row of a point, then count and report it."""
        with self._lock:
            self.store.append(row)
            self.count += 1
            spent = time.perf_counter() - self._begin
            self._report(f"[{self.todo.count()}/{self._total}, {spent:.0f} s] {text}")

    def fail(self, text: str) -> None:
        """Note and report a group that failed."""
        with self._lock:
            self.errors.append(text)
            self._report(f"FAILED {text}")


def work_off(progress: Progress, trainers: Sequence[Callable[[Group], None]]) -> None:
    """Let each trainer, in a thread of its own, train groups until none is left.

    A group that fails is reported and leaves the others alone; its points have no row and are tried again next time.

    Raises:
      RuntimeError: groups have failed, after all others have been trained.
    """
    pool = futures.ThreadPoolExecutor(len(trainers))
    try:
        for job in futures.as_completed([pool.submit(_train_groups, progress, train) for train in trainers]):
            job.result()
    except BaseException:  # interrupted: what is under way ends as soon as it can
        progress.stopped = True
        raise
    finally:
        pool.shutdown(wait=not progress.stopped, cancel_futures=True)
    if progress.errors:
        failed, number = len(progress.errors), len(progress.todo.groups)
        raise RuntimeError(f"{failed} of {number} groups failed: {progress.errors[0]}")


def _train_groups(progress: Progress, train: Callable[[Group], None]) -> None:
    while not progress.stopped and (group := progress.todo.take()):
        try:
            train(group)
        except Exception as error:  # the other groups are still worth their time
            progress.fail(f"{describe(group[0][1])}: {type(error).__name__}: {str(error)[:500]}")


def unfinished(sweep: Sweep, store: Store) -> Iterator[Point]:
    """Yield the points that have no row."""
    finished = store.ids()
    return (point for point, trial in sweep.trials() if trial.id not in finished)

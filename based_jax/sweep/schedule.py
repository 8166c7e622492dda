"""What of a sweep is left to do: groups of points, each claimed once by whoever asks first, on this host or another."""

import dataclasses
import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

from based_jax.store import Store, StoreError
from based_jax.sweep.claims import Claims
from based_jax.sweep.lane_training import MAX_COMPILER_THREADS, MAX_LANES
from based_jax.sweep.points import Point
from based_jax.sweep.rows import describe
from based_jax.sweep.trial import Sweep, Trial

Group = list[tuple[Point, Any]]
"""Points that train together, with their `Sweep.config_class`."""
SECONDS_BETWEEN_LOOKS = 2.0
"""At groups that others have claimed, when nothing else is left."""
SECONDS_BETWEEN_SIGNALS = 0.5
"""For which a signal may go unseen."""
OPEN, TAKEN, CLOSED = range(3)
"""States of a group: to be claimed, claimed by a process of this command, or done, or failed."""


class SweepFailedError(RuntimeError):
    """Groups, or processes, have failed, after all others have been trained."""


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run; nothing here changes a number of a row but its times.

    Attributes:
      max_lanes: trials trained together, at most.
      workers: threads that train groups on each device, or whole runs, at a time; None for what suits the engine.
      compiler_threads: programs that a group compiles at the same time.
      part: (i, n) to take every n-th group from the i-th on (`part_of`).
      command: what the rows name as their command.
      until: of `time.time`, after which no group is begun.
    """

    max_lanes: int = MAX_LANES
    workers: int | None = None
    compiler_threads: int = MAX_COMPILER_THREADS
    part: tuple[int, int] = (0, 1)
    command: str = ""
    until: float = math.inf


class Todo:
    """The groups that have points without a row, each taken once, by whichever thread or process asks first.

    Processes that are forked after share it.

    Attributes:
      groups: what is left of this part.
      total, finished: points without a row, and with one, at the start.
      sharers: processes of this command that train at the same time.

    Args:
      groups: of the whole sweep, the same and in the same order in every process.
      store: of the rows.
      part: (i, n) to take every n-th group from the i-th on.
    """

    def __init__(self, groups: Sequence[Group], store: Store, part: tuple[int, int] = (0, 1)):
        first, step = part
        finished = store.ids()
        # Cut before anything is left out: parts that start at different times find different rows in the store.
        mine = groups[first::step]
        self.groups = [left for group in mine if (left := _without(group, finished))]
        self.total = sum(map(len, self.groups))
        self.finished = sum(map(len, mine)) - self.total
        self.sharers = 1
        self._store = store
        self._places = {claim_name(group): place for place, group in enumerate(self.groups)}
        # Without a lock, which a killed process would keep: who writes a group's state has its claim.
        self._states = multiprocessing.RawArray("b", [OPEN] * len(self.groups) or [CLOSED])
        self._done = multiprocessing.Value("i", 0)

    @property
    def is_open(self) -> bool:
        """Whether a group is left that this command has neither trained nor under way."""
        return OPEN in list(self._states)

    def take(self, claims: Claims) -> Group | None:
        """Claim the first group that can be had, and return its points without a row; None if there is none now.

        Whoever had a claim has written its rows before giving it back, so rows are looked for after it was obtained.
        """
        for place, group in enumerate(self.groups):
            if self._states[place] == OPEN and claims.take(claim_name(group)):
                was_open, self._states[place] = self._states[place] == OPEN, TAKEN
                left = _without(group, self._store.ids()) if was_open else []
                self.count(len(group) - len(left) if was_open else 0)
                if left:
                    return left
                self._close(place, claims)
        return None

    def give_back(self, group: Group, claims: Claims) -> None:
        """End the claim of a group that has been trained, or that failed."""
        self._close(self._places[claim_name(group)], claims)

    def count(self, number: int = 1) -> int:
        """Count points that are done; return how many are, whoever has trained them."""
        with self._done:
            self._done.value += number
            return self._done.value

    def _close(self, place: int, claims: Claims) -> None:
        self._states[place] = CLOSED
        claims.give_back(claim_name(self.groups[place]))


def claim_name(group: Group) -> str:
    """Return the same for any two groups, of whatever sweeps, that may share a point."""
    config = group[0][1]
    return config.signature if isinstance(config, Trial) else config.id


def _without(group: Group, finished: set[str]) -> Group:
    return [found for found in group if found[1].id not in finished]


class Engine(Protocol):
    """A way to train the points of a sweep: which of them are trained together, and how a group is."""

    def __init__(self, sweep: Sweep): ...

    def groups(self) -> list[Group]:
        """Return all points in groups, the same in every process."""
        ...

    def check(self, points: Group) -> None:
        """Raise UserError if a point cannot be trained here; it may make use of the devices."""
        ...

    def place(self, options: SweepOptions) -> str:
        """Return where groups are trained in this process, in words."""
        ...

    def prepare(self, points: Group, starmap: Callable) -> None:
        """Make what all processes share that are forked after, by `starmap`."""
        ...

    def train(self, progress: "Progress", name: str, options: SweepOptions) -> None:
        """Train groups until none is left, each point with a row under the sweep's name; errors as of `work_off`."""
        ...


class Progress:
    """What a process does for a sweep: claims, keeps the rows of what is done, says so, and knows whether to go on."""

    def __init__(self, todo: Todo, store: Store, report: Callable[[str], None], until: float = math.inf):
        self.todo, self.store, self.claims, self._until = todo, store, Claims(store), until
        self.count, self.stopped = 0, False
        self.parallel = todo.sharers
        self.errors: list[str] = []
        self._report, self._lock = report, threading.Lock()
        self._seconds, self._begin, self._has_waited = 0.0, time.perf_counter(), False

    def groups(self) -> Iterator[Group]:
        """Yield groups to train until none is left, or no time, waiting for those that others have claimed.

        What they finish needs no training any more; what they leave behind is taken over.
        """
        looks = 0
        while not self.stopped and time.time() < self._until:
            if group := self.todo.take(self.claims):
                try:
                    yield group
                finally:
                    self.todo.give_back(group, self.claims)
            elif self.todo.is_open:
                looks += 1
                self._wait(looks)
            else:
                return

    def finish(self, row: Mapping[str, Any], text: str) -> None:
        """Store the row of a point, then count and report it; after `stop` the point is no longer this process's."""
        with self._lock:
            if self.stopped:
                return
            self.store.append(row)
            self.count += 1
            self._seconds += row["seconds"]
            done, spent = self.todo.count(), time.perf_counter() - self._begin
            self._report(f"[{done}/{self.todo.total}, {spent:.0f} s{self._time_left(self.todo.total - done)}] {text}")

    def fail(self, text: str) -> None:
        """Note and report a group that failed."""
        with self._lock:
            self.errors.append(text)
            self._report(f"FAILED {text}")

    def stop(self) -> None:
        """Train no further group, and store no further row."""
        with self._lock:
            self.stopped = True

    def _time_left(self, points: int) -> str:
        """Return about how long so many points take to train, in words: a row's seconds are those without compiling."""
        return f", about {points * self._seconds / self.count / self.parallel:.0f} s left" if points > 0 else ""

    def _wait(self, looks: int) -> None:
        with self._lock:
            # At the first look a claim may be of this command, and about to be told as such.
            if looks == 2 and not self._has_waited:
                self._has_waited = True
                self._report("All that is left is claimed by other commands on this store; waiting for them.")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def work_off(progress: Progress, trainers: Sequence[Callable[[Group], None]], parallel: int = 1) -> None:
    """Let each trainer, in a thread of its own, train groups until none is left.

    A group that fails is reported and leaves the others alone; its points have no row and are tried again next time.

    Args:
      progress: of this process; its claims end here.
      trainers: one for each thread.
      parallel: groups whose seconds pass at the same time.

    Raises:
      StoreError: a row or a claim cannot be written; nothing goes on then.
      SweepFailedError: groups have failed, after all others have been trained.
    """
    progress.parallel = parallel * progress.todo.sharers
    pool = futures.ThreadPoolExecutor(len(trainers))
    with progress.claims:
        try:
            jobs = {pool.submit(_train_groups, progress, train) for train in trainers}
            while jobs:  # in short waits: a signal that comes right before one is seen after it
                done, jobs = futures.wait(jobs, SECONDS_BETWEEN_SIGNALS, futures.FIRST_COMPLETED)
                for job in done:
                    job.result()
        except BaseException:  # interrupted: what is under way ends as soon as it can
            progress.stop()
            raise
        finally:
            pool.shutdown(wait=not progress.stopped, cancel_futures=True)
    Claims(progress.store).clear()
    if progress.errors:
        failed, number = len(progress.errors), len(progress.todo.groups)
        raise SweepFailedError(f"{failed} of {number} groups failed: {progress.errors[0]}")


def _train_groups(progress: Progress, train: Callable[[Group], None]) -> None:
    for group in progress.groups():
        try:
            train(group)
        except StoreError:  # there is no place for any other group's rows either
            raise
        except Exception as error:  # the other groups are still worth their time
            progress.fail(f"{describe(group[0][1])}: {type(error).__name__}: {str(error)[:500]}")


def unfinished(sweep: Sweep, store: Store) -> list[tuple[Point, Any]]:
    """Return the points that have no row, with their configs."""
    return _without(sweep.trials(), store.ids())

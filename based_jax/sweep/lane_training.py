"""The training of one signature's trials as lanes: epochs, tests after each, and lanes that leave before the end."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from based_jax.data.segments import SegmentSource, Split
from based_jax.labels import is_labelled
from based_jax.sweep import lanes
from based_jax.sweep.lanes import Lanes, PlacedExamples, Program, Rates
from based_jax.sweep.trial import Trial

GROUP_MEMORY_FRACTION = 0.8
"""Of what is free on the device, for one group."""
MAX_LANES = 16
MAX_COMPILER_THREADS = 8
"""Programs that a group compiles at the same time, at most."""
MIN_SAVED_FRACTION = 0.5
"""Of the seconds that compiling took: what programs for fewer lanes must save to be compiled, beside the training."""
PROGRAM_KINDS = "beginning", "train", "test"


@dataclasses.dataclass
class Outcome:
    """What a trial has come to.

    Attributes:
      status: "running", "finished" (all epochs), "converged" (past the accuracy to stop at) or "diverged" (not finite).
      curve, losses: accuracy on the tests after each epoch, and mean training loss in it, in nats.
      segments: accuracy on each test segment after the last epoch.
      steps: updates.
      seconds: of the device, its share where lanes are trained together.
      compile_seconds: likewise, of the host.
    """

    status: str = "running"
    curve: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    segments: dict[str, float] = dataclasses.field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0


class Resident:
    """The examples of a task on a device, and the batches of an epoch as rows of them."""

    def __init__(self, trial: Trial, source: SegmentSource):
        self.source, self.batch_size = source, trial.batch_size
        task = self.source.task
        self.train = self._examples("train", len(task.train))
        self.test = dict(zip(self.source.eval_names, self._examples("test", len(task.test)), strict=True))
        [self.device] = self.train[0].inputs.devices()
        self.tokens = max(x.inputs.shape[1] for x in self.train) * trial.batch_size

    def _examples(self, split: Split, number: int) -> list[PlacedExamples]:
        """Return the segments of a split; those of one length ask for as many answers, to share a program."""
        found = [self.source.examples(split, i) for i in range(number)]
        asked: dict[tuple, int] = collections.defaultdict(lambda: 1)
        for inputs, labels in found:
            asked[inputs.shape] = max(asked[inputs.shape], is_labelled(labels).sum(axis=1).max())
        return [PlacedExamples.of(inputs, labels, asked[inputs.shape]) for inputs, labels in found]

    def dispatches(self, epoch: int) -> Iterator[tuple[PlacedExamples, np.ndarray, int]]:
        """Yield (examples, rows of `Lanes.training`, number of steps): successive batches of one segment."""
        for segment, batches in itertools.groupby(self.source.order(epoch), key=lambda batch: batch[0]):
            taken = [rows for _, rows in batches]
            for first in range(0, len(taken), lanes.MAX_STEPS_PER_DISPATCH):
                part = taken[first : first + lanes.MAX_STEPS_PER_DISPATCH]
                rows = np.full((lanes.MAX_STEPS_PER_DISPATCH, self.batch_size), -1, np.int32)
                for row, ids in zip(rows, part, strict=False):
                    row[: len(ids)] = ids
                yield self.train[segment], rows, len(part)

    def test_rows(self, examples: PlacedExamples) -> int:
        """Return how many test examples are read together: as many tokens as the largest training batch."""
        return max(1, self.tokens // examples.inputs.shape[1])


class Programs:
    """What is compiled for a number of lanes, and the seconds that it took."""

    def __init__(self, trial: Trial, data: Resident, number: int, compiler_threads: int = MAX_COMPILER_THREADS):
        self.lanes, self.data, self.compiler_threads = Lanes(trial, number), data, compiler_threads
        self.calls: dict[tuple, Callable[[], Program]] = {("beginning", ()): self.lanes.beginning}
        for examples in sorted(data.train, key=_size, reverse=True):
            self.calls["train", _key(examples)] = functools.partial(self.lanes.training, examples)
        for examples in data.test.values():
            rows = data.test_rows(examples)
            self.calls["test", _key(examples)] = functools.partial(self.lanes.testing, examples, rows)
        self.programs: dict[tuple, Program] = {}
        self.seconds = 0.0

    def fits(self) -> bool:
        """Return whether the memory of the largest training program is there; compile that."""
        self._compile([next(key for key in self.calls if key[0] == "train")])
        stats = self.data.device.memory_stats()
        most = max(program.bytes for (kind, _), program in self.programs.items() if kind == "train")
        return not stats or most <= GROUP_MEMORY_FRACTION * (stats["bytes_limit"] - stats["bytes_in_use"])

    def compile(self, *kinds: str) -> float:
        """Compile the programs of these kinds, several at a time; return the seconds."""
        return self._compile([key for key in self.calls if key[0] in kinds and key not in self.programs])

    def _compile(self, keys: Sequence[tuple]) -> float:
        begin = time.perf_counter()
        with futures.ThreadPoolExecutor(self.compiler_threads) as pool:
            jobs = {key: pool.submit(self._here, self.calls[key]) for key in keys}
        self.programs |= {key: job.result() for key, job in jobs.items()}
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        return seconds

    def _here(self, call: Callable[[], Program]) -> Program:
        with jax.default_device(self.data.device):  # which each thread has for itself
            return call()

    def beginning(self, seeds: jax.Array):
        """Return the states before the first step."""
        return self.programs["beginning", ()].call(seeds)

    def epoch(self, states, rates: Rates, number: int):
        """Return the states after an epoch, and the mean training loss of each lane."""
        total, steps = jnp.zeros(self.lanes.number), 0
        for examples, rows, count in self.data.dispatches(number):
            train = self.programs["train", _key(examples)].call
            states, losses = train(states, rates, examples, rows, jnp.int32(count))
            total, steps = total + losses, steps + count
        return states, total / steps

    def accuracies(self, params) -> dict[str, jax.Array]:
        """Return the accuracy of each lane on each test segment."""
        return {name: self.programs["test", _key(x)].call(params, x) for name, x in self.data.test.items()}


def fitting_programs(
    trial: Trial, data: Resident, number: int, compiler_threads: int = MAX_COMPILER_THREADS
) -> Programs:
    """Return the programs for as many lanes as fit, halving from `number`; for one lane whether it fits or not."""
    programs = Programs(trial, data, number, compiler_threads)
    while not programs.fits() and number > 1:
        number = -(-number // 2)
        programs = Programs(trial, data, number, compiler_threads)
    programs.compile(*PROGRAM_KINDS)
    return programs


def train_lanes(
    trials: Sequence[Trial],
    data: Resident,
    *,
    max_lanes: int = MAX_LANES,
    compiler_threads: int = MAX_COMPILER_THREADS,
    device: contextlib.AbstractContextManager | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Trial, Outcome]]:
    """Yield each trial with its outcome as soon as it is known.

    Args:
      trials: of one signature.
      data: their data.
      max_lanes: lanes at most; fewer where the device's memory holds fewer.
      compiler_threads: programs to compile at the same time.
      device: held from the first step of trials that train together to their last; they are compiled without it.
      stopped: asked before each epoch; trials under way then have no outcome.
    """
    device = device or threading.Lock()
    programs = fitting_programs(trials[0], data, min(max_lanes, len(trials)), compiler_threads)
    number = programs.lanes.number
    for first in range(0, len(trials), number):
        batch = trials[first : first + number]
        with device:
            yield from _LaneGroup(batch, programs).train(stopped)


class _LaneGroup:
    """Trials in their lanes; a lane without a trial repeats another one's.

    Where lanes have left, programs for fewer of them are compiled beside the training: those that train first. Until
    those that test are there as well, the tests have more lanes than the training.
    """

    def __init__(self, trials: Sequence[Trial], programs: Programs):
        self.programs = self.tests = programs
        self.smaller: _Smaller | None = None
        self.compiler = futures.ThreadPoolExecutor(1)
        self.outcomes = [Outcome(compile_seconds=programs.seconds / len(trials)) for _ in trials]
        self.trials = list(trials)
        self.lane_of = {i: i for i in range(len(trials))}
        filled = [*trials, *[trials[0]] * (programs.lanes.number - len(trials))]
        self.rates = Rates(
            *(jnp.asarray([getattr(x.optim, name) for x in filled], jnp.float32) for name in Rates._fields)
        )
        self.seeds = jnp.asarray([x.seed for x in filled], jnp.uint32)

    def train(self, stopped: Callable[[], bool]) -> Iterator[tuple[Trial, Outcome]]:
        try:
            yield from self._epochs(stopped)
        finally:
            self.compiler.shutdown(wait=False, cancel_futures=True)

    def _epochs(self, stopped: Callable[[], bool]) -> Iterator[tuple[Trial, Outcome]]:
        trial = self.trials[0]
        states = self.programs.beginning(self.seeds)
        for epoch in range(trial.epochs):
            if stopped():
                return
            states, seconds = self._epoch(states, epoch)
            for i in list(self.lane_of):
                self.outcomes[i].status = self._status(i, epoch)
                if self.outcomes[i].status != "running":
                    del self.lane_of[i]
                    yield self.trials[i], self.outcomes[i]
            if not self.lane_of:
                return
            states = self._shrunk(states, seconds * (trial.epochs - epoch - 1))

    def _epoch(self, states, epoch: int):
        """Train and test; return the states and the seconds of the device."""
        begin = time.perf_counter()
        states, losses = self.programs.epoch(states, self.rates, epoch)
        losses, segments = jax.device_get((losses, self._accuracies(states.params)))
        seconds = time.perf_counter() - begin
        weights = {x.name: x.num_examples for x in self.programs.data.source.task.test}
        for i, lane in self.lane_of.items():
            outcome = self.outcomes[i]
            outcome.segments = {name: float(found[lane]) for name, found in segments.items()}
            outcome.curve.append(float(np.average(list(outcome.segments.values()), weights=list(weights.values()))))
            outcome.losses.append(float(losses[lane]))
            outcome.steps += self.trials[i].steps_per_epoch
            outcome.seconds += seconds / len(self.lane_of)
        return states, seconds

    def _accuracies(self, params) -> dict[str, jax.Array]:
        """Return the accuracy of each lane on each test segment, and those of lanes again if the tests have more."""
        number, tested = self.programs.lanes.number, self.tests.lanes.number
        if number != tested:
            params = lanes.chosen(params, np.resize(range(number), tested))
        return self.tests.accuracies(params)

    def _status(self, i: int, epoch: int) -> str:
        outcome, trial = self.outcomes[i], self.trials[i]
        if not np.isfinite(outcome.losses[-1]):
            return "diverged"
        if trial.stop_accuracy is not None and outcome.curve[-1] > trial.stop_accuracy:
            return "converged"
        return "finished" if epoch + 1 == trial.epochs else "running"

    def _shrunk(self, states, seconds_left: float):
        """Return the states, those of the lanes that go on alone once programs for so many have been compiled."""
        number = len(self.lane_of)
        saved = seconds_left * (1 - number / self.programs.lanes.number)
        if self.smaller is None and saved > MIN_SAVED_FRACTION * self.programs.seconds:
            programs = Programs(self.trials[0], self.programs.data, number, self.programs.compiler_threads)
            self.smaller = _Smaller(programs, *(self.compiler.submit(programs.compile, x) for x in ("train", "test")))
        if self.smaller is None:
            return states
        programs, train, test = self.smaller
        if train.done() and self.programs is not programs:
            self.programs = programs
            self._count(train.result())
            states = self._moved(states)
        if self.programs is programs and test.done():
            self.tests, self.smaller = programs, None
            self._count(test.result())
        return states

    def _count(self, compile_seconds: float) -> None:
        for i in self.lane_of:
            self.outcomes[i].compile_seconds += compile_seconds / len(self.lane_of)

    def _moved(self, states):
        """Return the states of the lanes that go on, and give these the first numbers."""
        kept = np.resize(list(self.lane_of.values()), self.programs.lanes.number)
        self.lane_of = {i: lane for lane, i in enumerate(self.lane_of)}
        self.rates = lanes.chosen(self.rates, kept)
        return lanes.chosen(states, kept)


class _Smaller(NamedTuple):
    """Programs for fewer lanes, and the seconds that it takes to compile those that train, then those that test."""

    programs: Programs
    train: futures.Future[float]
    test: futures.Future[float]


def _key(examples: PlacedExamples) -> tuple:
    return examples.inputs.shape, examples.where.shape


def _size(examples: PlacedExamples) -> int:
    """Return tokens and answers of a row: the most memory is taken where they are most."""
    return sum(examples.shape)

"""Trains the trials of one signature as lanes: epochs, tests after each, and lanes that leave before the end."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from based_jax.data.segments import SegmentSource, Split
from based_jax.sweep import lanes
from based_jax.sweep.lanes import Examples, Lanes, Program, Rates
from based_jax.sweep.trial import Trial
from based_jax.train.step import IGNORED

MEMORY = 0.8
"""Of what is free on the device, for one group."""
MOST_LANES = 16
COMPILERS = 8
"""Programs that a group compiles at the same time, at most."""
WORTH = 0.5
"""Of the seconds that compiling took: what programs for fewer lanes must save to be compiled, beside the training."""


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

    def _examples(self, split: Split, number: int) -> list[Examples]:
        """Return the segments of a split; those of one length ask for as many answers, to share a program."""
        found = [self.source.examples(split, i) for i in range(number)]
        asked: dict[tuple, int] = collections.defaultdict(lambda: 1)
        for inputs, labels in found:
            asked[inputs.shape] = max(asked[inputs.shape], (labels != IGNORED).sum(axis=1).max())
        return [Examples.of(inputs, labels, asked[inputs.shape]) for inputs, labels in found]

    def dispatches(self, epoch: int) -> Iterator[tuple[Examples, np.ndarray, int]]:
        """Yield (examples, rows (STEPS, B), number of steps): batches of one segment that follow each other."""
        for segment, batches in itertools.groupby(self.source.order(epoch), key=lambda batch: batch[0]):
            taken = [rows for _, rows in batches]
            for first in range(0, len(taken), lanes.STEPS):
                part = taken[first : first + lanes.STEPS]
                rows = np.full((lanes.STEPS, self.batch_size), -1, np.int32)
                for row, ids in zip(rows, part, strict=False):
                    row[: len(ids)] = ids
                yield self.train[segment], rows, len(part)

    def test_rows(self, examples: Examples) -> int:
        """Return how many test examples are read together: as many tokens as the largest training batch."""
        return max(1, self.tokens // examples.inputs.shape[1])


class Programs:
    """Everything compiled for a number of lanes."""

    def __init__(self, trial: Trial, data: Resident, number: int, compilers: int = COMPILERS):
        begin = time.perf_counter()
        self.lanes, self.data, self.compilers = Lanes(trial, number), data, compilers
        self.train, self.test = ({_key(x): x for x in examples} for examples in (data.train, data.test.values()))
        largest = max(self.train, key=lambda key: _size(self.train[key]))
        self.programs = {("train", largest): self._training(largest)}
        if self.fits():
            self._compile_rest(largest)
        self.seconds = time.perf_counter() - begin

    def fits(self) -> bool:
        """Return whether the memory of the training programs is there."""
        stats = self.data.device.memory_stats()
        most = max(program.bytes for (kind, _), program in self.programs.items() if kind == "train")
        return not stats or most <= MEMORY * (stats["bytes_limit"] - stats["bytes_in_use"])

    def _compile_rest(self, largest: tuple) -> None:
        """Compile all but the largest training program, several at a time."""
        calls = {("beginning", ()): self.lanes.beginning}
        calls |= {("train", key): functools.partial(self._training, key) for key in self.train if key != largest}
        calls |= {("test", key): functools.partial(self._testing, key) for key in self.test}
        with futures.ThreadPoolExecutor(self.compilers) as pool:
            jobs = {key: pool.submit(self._here, call) for key, call in calls.items()}
        self.programs |= {key: job.result() for key, job in jobs.items()}

    def _here(self, call: Callable[[], Program]) -> Program:
        with jax.default_device(self.data.device):  # which each thread has for itself
            return call()

    def _training(self, key: tuple) -> Program:
        return self.lanes.training(self.train[key])

    def _testing(self, key: tuple) -> Program:
        return self.lanes.testing(self.test[key], self.data.test_rows(self.test[key]))

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


def fitting(trial: Trial, data: Resident, number: int, compilers: int = COMPILERS) -> Programs:
    """Return the programs for as many lanes as fit, halving from `number`; for one lane whether it fits or not."""
    programs = Programs(trial, data, number, compilers)
    while not programs.fits() and number > 1:
        number = -(-number // 2)
        programs = Programs(trial, data, number, compilers)
    return programs


def train(
    trials: Sequence[Trial],
    data: Resident,
    *,
    most_lanes: int = MOST_LANES,
    compilers: int = COMPILERS,
    device: contextlib.AbstractContextManager | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Trial, Outcome]]:
    """Yield each trial with its outcome as soon as it is known.

    Args:
      trials: of one signature.
      data: their data.
      most_lanes: lanes at most; fewer where the device's memory holds fewer.
      compilers: programs to compile at the same time.
      device: held from the first step of trials that train together to their last; they are compiled without it.
      stopped: asked before each epoch; trials under way then have no outcome.
    """
    device = device or threading.Lock()
    programs = fitting(trials[0], data, min(most_lanes, len(trials)), compilers)
    number = programs.lanes.number
    for first in range(0, len(trials), number):
        batch = trials[first : first + number]
        with device:
            yield from _Batch(batch, programs).run(stopped)


class _Batch:
    """Trials in their lanes; a lane without a trial repeats another one's."""

    def __init__(self, trials: Sequence[Trial], programs: Programs):
        self.programs = programs
        self.smaller: futures.Future[Programs] | None = None
        self.compiler = futures.ThreadPoolExecutor(1)
        self.outcomes = [Outcome(compile_seconds=programs.seconds / len(trials)) for _ in trials]
        self.trials = list(trials)
        self.lane_of = {i: i for i in range(len(trials))}
        filled = [*trials, *[trials[0]] * (programs.lanes.number - len(trials))]
        self.rates = Rates(
            *(jnp.asarray([getattr(x.optim, name) for x in filled], jnp.float32) for name in Rates._fields)
        )
        self.seeds = jnp.asarray([x.seed for x in filled], jnp.uint32)

    def run(self, stopped: Callable[[], bool]) -> Iterator[tuple[Trial, Outcome]]:
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
        losses, segments = jax.device_get((losses, self.programs.accuracies(states.params)))
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
        if self.smaller is None and saved > WORTH * self.programs.seconds:
            self.smaller = self.compiler.submit(self._programs, number)
        if self.smaller is None or not self.smaller.done():
            return states
        self.programs, self.smaller = self.smaller.result(), None
        kept = list(self.lane_of.values())
        kept += kept[:1] * (self.programs.lanes.number - number)
        for i in self.lane_of:
            self.outcomes[i].compile_seconds += self.programs.seconds / number
        self.lane_of = {i: lane for lane, i in enumerate(self.lane_of)}
        self.rates = lanes.chosen(self.rates, kept)
        return lanes.chosen(states, kept)

    def _programs(self, number: int) -> Programs:
        data = self.programs.data
        with jax.default_device(data.device):  # which each thread has for itself
            return Programs(self.trials[0], data, number, self.programs.compilers)


def _key(examples: Examples) -> tuple:
    return examples.inputs.shape, examples.where.shape


def _size(examples: Examples) -> int:
    """Return tokens and answers of a row: the most memory is taken where they are most."""
    return sum(examples.shape)

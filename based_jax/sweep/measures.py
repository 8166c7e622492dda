"""What a sweep measures of each whole run after its last step, got ready while it waits and trains."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.nn.lm import LM
from based_jax.store import Store
from based_jax.sweep.device_lock import DeviceLock
from based_jax.train.checkpoint import SavedCheckpoints
from based_jax.train.compile import TrainProgram
from based_jax.train.run import TrainConfig
from based_jax.train.step import TrainState
from based_jax.train.workdir import CHECKPOINTS_FOLDER, METRICS_FILE


class NoTimeLeft(Exception):
    """A run whose turn came too late."""


class Measures(Protocol):
    """What the row of one config gets beside the run's own evaluation; made in the run's process."""

    def facts(self) -> dict[str, Any]:
        """Return what stands in the row whatever the run has come to."""
        ...

    def warm(self, model: LM) -> None:
        """Compile what `of` needs, by a model that has not been trained; another run may be training meanwhile."""
        ...

    def of(self, model: LM, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what is measured of the trained model, alone on the device.

        Args:
          model: after the last step.
          metrics: the rows of the run's metrics.jsonl.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Deadline:
    """By when runs are to have been trained.

    Attributes:
      until: of `time.time`.
      store, sweep: whose rows tell how long a run takes.
    """

    until: float
    store: Path
    sweep: str

    def check(self) -> None:
        """Raise NoTimeLeft if a run that began now would not end in time."""
        if self.until == math.inf:
            return
        seconds, left = self._seconds(), self.until - time.time()
        if left <= seconds:
            raise NoTimeLeft(f"{max(left, 0):.0f} s are left, and a run takes {seconds:.0f} s")

    def _seconds(self) -> float:
        """Return how long the training of the longest run so far took; 0 where there is none."""
        rows = [row for row in Store(self.store).rows() if row.get("sweep") == self.sweep]
        return max((row.get("training_seconds", row["seconds"]) for row in rows), default=0.0)


class MeasuredRun:
    """The turns of a run on a device that it shares: to be trained (`train.loop.Turn`), then to be measured.

    Of the runs of one device one at a time has a turn; the others compile meanwhile, and have their measures taken of
    the weights before training, which compiles what is needed after it.

    Args:
      measures: of the run's config.
      deadline: for its first turn.

    Attributes:
      begun: whether it has had its first turn.
      seconds: what it took, by name.
    """

    def __init__(self, measures: Measures, deadline: Deadline):
        self.measures, self._deadline, self.begun = measures, deadline, False
        self._begin = time.perf_counter()
        self._lock = DeviceLock(jax.local_devices()[0])
        self._thread = ThreadPoolExecutor(1)
        self._warming: Future | None = None
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def turn(self, program: TrainProgram, state: TrainState) -> Iterator[None]:
        """Begin to warm, wait for the device, and have it while the run is trained.

        Raises:
          NoTimeLeft: it would not end before the deadline.
        """
        self._program = program
        params = jax.tree.map(jnp.copy, state.params)  # a step takes the arrays that it is given
        self._warming = self._thread.submit(self.measures.warm, nnx.merge(program.graphdef, params))
        self.seconds["seconds_to_prepare"] = time.perf_counter() - self._begin
        with self._lock:
            self._deadline.check()
            self.begun = True
            with self._timed("training_seconds"):
                yield

    def measured(self, workdir: Path) -> dict[str, Any]:
        """Return what is measured of the run in its workdir, when all that it needs is compiled."""
        assert self._warming is not None
        self._warming.result()
        where = {"params": self._program.abstract_state.params}  # as those that were warmed with lie
        _, fields = SavedCheckpoints(workdir / CHECKPOINTS_FOLDER).restore(where, self._program.config.steps)
        model = nnx.merge(self._program.graphdef, fields["params"])
        metrics = [json.loads(line) for line in (workdir / METRICS_FILE).read_text("utf-8").splitlines()]
        with self._lock, self._timed("measuring_seconds"):
            return self.measures.of(model, metrics)

    def facts(self) -> dict[str, Any]:
        """Return what stands in the row whatever the run has come to, with its times."""
        spent = sum(self.seconds.get(name, 0.0) for name in ("training_seconds", "measuring_seconds"))
        return self.measures.facts() | {name: round(x, 2) for name, x in (self.seconds | {"seconds": spent}).items()}

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - begin


def trained_per_second(metrics: list[dict[str, Any]]) -> float:
    """Return the median of the tokens/s that a run's rows tell, without the first, in which it waited for its turn."""
    speeds = [row["tokens_per_second"] for row in metrics if "tokens_per_second" in row]
    return median(speeds[1:] or speeds)


MeasuresOf = Callable[[TrainConfig], Measures]

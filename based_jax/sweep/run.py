"""Runs a sweep: unfinished points by signature, several signatures at a time, one row in the store for each point."""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import itertools
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from based_jax import config as configs
from based_jax.data.segments import SegmentSource
from based_jax.nn import names
from based_jax.nn.lm import LM
from based_jax.store import Store
from based_jax.sweep import engine
from based_jax.sweep.engine import Outcome, Resident
from based_jax.sweep.points import Point
from based_jax.sweep.trial import Sweep, Trial

Work = list[tuple[Point, Trial]]
"""Points of one signature."""

WORKERS = {"gpu": 6, "tpu": 4}
"""Groups under way on a device: while one of them trains, the others compile."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep is run; nothing here changes a number of a row but its times.

    Attributes:
      most_lanes: trials trained together, at most.
      workers: groups under way on each device; None for what suits its kind.
      compilers: programs that a group compiles at the same time.
      part: (i, n) to take every n-th group from the i-th on (`Todo`).
      command: what the rows name as their command.
    """

    most_lanes: int = engine.MOST_LANES
    workers: int | None = None
    compilers: int = engine.COMPILERS
    part: tuple[int, int] = (0, 1)
    command: str = ""


def groups(sweep: Sweep) -> list[Work]:
    """Return the points by signature, those that take longest first."""
    found: dict[str, Work] = {}
    for point, trial in sweep.trials():
        found.setdefault(trial.signature, []).append((point, trial))
    return sorted(found.values(), key=_work, reverse=True)


class Todo:
    """The groups that have points without a row, each taken once, by whichever thread or process asks first.

    Processes that are forked after share it. It makes no use of a device before groups are asked for.
    """

    def __init__(self, sweep: Sweep, store: Store, part: tuple[int, int] = (0, 1)):
        self._sweep, self._part, self._finished = sweep, part, store.ids()
        self._taken, self._done = (multiprocessing.Value("i", 0) for _ in range(2))

    @functools.cached_property
    def groups(self) -> list[Work]:
        """All groups of this part, the longest first."""
        first, step = self._part
        # Cut before anything is left out: parts that start at different times find different rows in the store.
        mine = groups(self._sweep)[first::step]
        return [left for group in mine if (left := [x for x in group if x[1].id not in self._finished])]

    def take(self) -> Work | None:
        """Return the first group that nobody has taken, or None."""
        with self._taken:
            place, self._taken.value = self._taken.value, self._taken.value + 1
        return self.groups[place] if place < len(self.groups) else None

    def count(self) -> int:
        """Count a point that is done; return how many are, in all processes."""
        with self._done:
            self._done.value += 1
            return self._done.value


def run(sweep: Sweep, store: Store, name: str, options: Options, report: Callable[[str], None] = print) -> int:
    """Train every point that the store has no row of; return how many were trained.

    A group that fails is reported and leaves the others alone; its points have no row and are tried again next time.

    Raises:
      UserError: a point is impossible; nothing has been trained then.
      RuntimeError: groups have failed, after all others have been trained.
    """
    return work_off(Todo(sweep, store, options.part), store, name, options, Sources(), report)


def work_off(
    todo: Todo, store: Store, name: str, options: Options, sources: "Sources", report: Callable[[str], None]
) -> int:
    """Train what is to do on the devices of this process; return how many points it has trained; errors as of `run`."""
    progress = _Progress(todo, report)
    errors: list[str] = []
    devices = jax.local_devices()
    workers = options.workers or WORKERS.get(devices[0].platform, 1)
    facts = facts_of(name, options.command)
    pool = futures.ThreadPoolExecutor(workers * len(devices))
    try:
        jobs = [
            pool.submit(_train_groups, todo, device, data, store, facts, options, progress, errors)
            for device, data in [(device, _Data(device, sources)) for device in devices]
            for _ in range(workers)
        ]
        for job in futures.as_completed(jobs):
            job.result()
    except BaseException:  # interrupted, or a disk that is full: what is under way ends with its epoch
        progress.stopped = True
        raise
    finally:
        pool.shutdown(wait=not progress.stopped, cancel_futures=True)
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(todo.groups)} groups failed: {errors[0]}")
    return progress.count


def _train_groups(
    todo: Todo, device, data: "_Data", store: Store, facts: dict, options: Options, progress, errors
) -> None:
    """Take groups and train them on a device until none is left."""
    while not progress.stopped and (group := todo.take()):
        points = {trial.id: point for point, trial in group}
        trials = [trial for _, trial in group]
        try:
            with jax.default_device(device):
                resident = data.of(trials[0])
                outcomes = engine.train(
                    trials, resident, most_lanes=options.most_lanes, compilers=options.compilers, device=data.busy
                )
                for trial, outcome in outcomes:
                    row = row_of(points[trial.id], trial, outcome) | facts
                    with progress.lock:
                        store.append(row)
                    progress.add(line(points[trial.id], trial, outcome))
        except Exception as error:  # the other groups are still worth their time
            errors.append(f"{describe(trials[0])}: {type(error).__name__}: {str(error)[:500]}")
            progress.report(f"FAILED {errors[-1]}")


class Sources:
    """The examples of every task, made once for all devices, and for all processes that are forked after."""

    def __init__(self):
        self._lock = threading.Lock()
        self._found: dict[str, SegmentSource] = {}

    def of(self, trial: Trial, starmap: Callable = itertools.starmap) -> SegmentSource:
        """Return a trial's source with all examples made, by `starmap`."""
        key = _data_id(trial)
        with self._lock:
            if key not in self._found:
                self._found[key] = trial.data.open(trial.batch_size, 0, 1)
                self._found[key].make_all(starmap)
            return self._found[key]


class _Data:
    """The resident data of a device, shared by all groups that train on the same, and who may use the device."""

    def __init__(self, device: jax.Device, sources: Sources):
        self.busy, self._sources, self._lock = Turns(device), sources, threading.Lock()
        self._found: dict[str, Resident] = {}

    def of(self, trial: Trial) -> Resident:
        with self._lock:
            if (key := _data_id(trial)) not in self._found:
                self._found[key] = Resident(trial, self._sources.of(trial))
            return self._found[key]


def _data_id(trial: Trial) -> str:
    return configs.config_id({"data": trial.resolved()["data"], "batch_size": trial.batch_size})


class Turns(contextlib.AbstractContextManager):
    """Held by who uses a device, among all threads and processes of a user that see the same devices.

    What a row calls its seconds is then its own, whoever else trains on the device.
    """

    def __init__(self, device: jax.Device):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        name = f"based_jax-{os.getuid()}-{device.platform}-{visible}-{device.id}.lock".replace("/", "_")
        self._file = (Path(tempfile.gettempdir()) / name).open("a")
        self._threads = threading.Lock()

    def __enter__(self) -> "Turns":
        self._threads.acquire()
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._threads.release()


class _Progress:
    """Counts what is done, says so, and knows whether to go on."""

    def __init__(self, todo: Todo, report: Callable[[str], None]):
        self.todo, self.report, self.lock = todo, report, threading.Lock()
        self.total, self.count = sum(map(len, todo.groups)), 0
        self.begin, self.stopped = time.perf_counter(), False

    def add(self, text: str) -> None:
        with self.lock:
            self.count += 1
            spent = time.perf_counter() - self.begin
            self.report(f"[{self.todo.count()}/{self.total}, {spent:.0f} s] {text}")


def row_of(point: Point, trial: Trial, outcome: Outcome) -> dict[str, Any]:
    """Return the row of a trained point, without what `facts_of` adds."""
    model = nnx.eval_shape(lambda: LM(trial.model, rngs=nnx.Rngs(0)))
    longest = max(segment.seq_len for segment in trial.data.resolved().test)
    elements = model.state_size(longest)
    return {
        "id": trial.id,
        "overrides": configs.to_dict(point),
        "config": trial.resolved(),
        "status": outcome.status,
        "accuracy": outcome.curve[-1],
        "segments": outcome.segments,
        "curve": [round(x, 6) for x in outcome.curve],
        "losses": [round(x, 6) for x in outcome.losses],
        "state_elements": elements,
        "state_bytes": 4 * elements,
        "params": model.num_params(),
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 3),
        "compile_seconds": round(outcome.compile_seconds, 3),
    }


def facts_of(name: str, command: str) -> dict[str, Any]:
    """Return what the rows of one run share: sweep, device, versions, revision and command."""
    versions = {library: importlib.metadata.version(library) for library in ("jax", "jaxlib", "flax", "optax")}
    device = jax.local_devices()[0].device_kind
    return {"sweep": name, "device": device, "versions": versions, "revision": revision(), "command": command}


def revision() -> str | None:
    """Return the git commit of this code, with "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + "+" * bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.check_output(["git", *words], cwd=folder, text=True, stderr=subprocess.DEVNULL).strip()


def describe(trial: Trial) -> str:
    """Return a trial's architecture in a few words: "base_conv + taylor, D 64, K 16"."""
    layers = trial.resolved()["model"]["layers"]
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(kind for kind, _ in layers)]
    kinds = " + ".join(f"{kind} x{count}" if count > 1 else kind for kind, count in runs)
    return f"{kinds}, {names.label(layers, trial.model.d_model)}"


def line(point: Point, trial: Trial, outcome: Outcome) -> str:
    """Return what a trained point has come to, in one line of print."""
    told = {key: value for key, value in point.items() if key not in ("model.d_model", "model.layers")}
    values = [f"{key}={value}" for key, value in told.items() if not isinstance(value, list | tuple | dict)]
    ended = f"{outcome.curve[-1]:.3f}, {outcome.status} after {len(outcome.curve)} epochs, {outcome.seconds:.1f} s"
    return f"{', '.join([describe(trial), *values])}: {ended}"


def _work(group: Sequence[tuple[Point, Trial]]) -> float:
    """Return about how much a group computes."""
    trial = group[0][1]
    model = nnx.eval_shape(lambda: LM(trial.model, rngs=nnx.Rngs(0)))
    tokens = sum(x.num_examples * x.seq_len for x in trial.data.resolved().train) * trial.epochs
    return len(group) * tokens * model.flops_per_token(max(x.seq_len for x in trial.data.resolved().train))


def unfinished(sweep: Sweep, store: Store) -> Iterator[Point]:
    """Yield the points that have no row."""
    finished = store.ids()
    return (point for point, trial in sweep.trials() if trial.id not in finished)

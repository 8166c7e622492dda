"""The engine of lanes: groups of one signature, several under way on each device, one row for each point."""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

import jax

from based_jax import config as configs
from based_jax.data.segments import SegmentSource
from based_jax.sweep import lane_training, rows
from based_jax.sweep.checks import abstract_model, check_groups, check_pass
from based_jax.sweep.device_lock import DeviceLock
from based_jax.sweep.lane_training import Resident
from based_jax.sweep.schedule import Group, Progress, SweepOptions, work_off
from based_jax.sweep.trial import Sweep, Trial

WORKERS_BY_PLATFORM = {"gpu": 6, "tpu": 4}
"""Threads that train groups on a device: while one of them trains, the others compile."""


class LaneEngine:
    """Trains points of one signature as lanes of one program; processes that are forked after share its examples."""

    def __init__(self, sweep: Sweep):
        self._sweep, self._sources = sweep, Sources()

    def groups(self) -> list[Group]:
        """Return the points by signature, those that take longest first."""
        return sorted(_by_signature(self._sweep.trials()), key=_flops, reverse=True)

    def check(self, points: Group) -> None:
        """Raise UserError if a point cannot be trained on this device."""
        check_groups(_by_signature(points), _check_trial)

    def place(self, options: SweepOptions) -> str:
        """Return where groups are trained, in words."""
        devices = jax.local_devices()
        return f"on {len(devices)} x {devices[0].device_kind}, up to {_workers(options)} at a time on each"

    def prepare(self, points: Group, starmap: Callable) -> None:
        """Make all examples, by `starmap`."""
        for _, trial in points:
            self._sources.of(trial, starmap)

    def train(self, progress: Progress, name: str, options: SweepOptions) -> None:
        """Train groups on the devices of this process until none is left."""
        devices = jax.local_devices()
        facts = rows.facts_of(name, options.command)
        examples = [DeviceExamples(device, self._sources) for device in devices]
        train_group = functools.partial(_train_group, progress, facts, options)
        trainers = [functools.partial(train_group, found) for found in examples for _ in range(_workers(options))]
        work_off(progress, trainers, parallel=len(devices))


def _workers(options: SweepOptions) -> int:
    return options.workers or WORKERS_BY_PLATFORM.get(jax.local_devices()[0].platform, 1)


def _by_signature(points: Group) -> list[Group]:
    found: dict[str, Group] = {}
    for point, trial in points:
        found.setdefault(trial.signature, []).append((point, trial))
    return list(found.values())


def _check_trial(trial: Trial) -> None:
    segments = (*trial.data.resolved.train, *trial.data.resolved.test)
    check_pass(trial, trial.steps, max(segment.seq_len for segment in segments))


def _flops(group: Group) -> float:
    """Return about how much a group computes."""
    trial = group[0][1]
    model = abstract_model(trial.model)
    tokens = sum(x.num_examples * x.seq_len for x in trial.data.resolved.train) * trial.epochs
    return len(group) * tokens * model.flops_per_token(max(x.seq_len for x in trial.data.resolved.train))


def _train_group(
    progress: Progress, facts: dict[str, Any], options: SweepOptions, examples: "DeviceExamples", group: Group
) -> None:
    points = {trial.id: point for point, trial in group}
    trials = [trial for _, trial in group]
    with jax.default_device(examples.device):
        outcomes = lane_training.train_lanes(
            trials,
            examples.of(trials[0]),
            max_lanes=options.max_lanes,
            compiler_threads=options.compiler_threads,
            device=examples.lock,
            stopped=lambda: progress.stopped,
        )
        for trial, outcome in outcomes:
            row = rows.lane_row(points[trial.id], trial, outcome) | facts
            progress.finish(row, rows.lane_line(points[trial.id], trial, outcome))


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
                self._found[key] = trial.data.open(trial.batch_size)
                self._found[key].make_all(starmap)
            return self._found[key]


class DeviceExamples:
    """The examples on a device, shared by all groups that train on the same, and the lock of who uses the device."""

    def __init__(self, device: jax.Device, sources: Sources):
        self.device, self.lock = device, DeviceLock(device)
        self._sources, self._making = sources, threading.Lock()
        self._found: dict[str, Resident] = {}

    def of(self, trial: Trial) -> Resident:
        """Return the examples of a trial's task."""
        with self._making:
            if (key := _data_id(trial)) not in self._found:
                self._found[key] = Resident(trial, self._sources.of(trial))
            return self._found[key]


def _data_id(trial: Trial) -> str:
    return configs.config_id({"data": trial.resolved["data"], "batch_size": trial.batch_size})

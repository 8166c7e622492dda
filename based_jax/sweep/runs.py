"""The engine of whole runs: each point is a run in a process of its own, with a workdir below the store.

A run that was stopped goes on from its checkpoint, and one that fails takes no other with it. This process makes no use
of a device, which would leave none of it to its runs. Where a sweep has measures, runs have the device one at a time
(`measures`): those that are under way beside it compile.
"""

import contextlib
import functools
import io
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from based_jax import compilation, parallel
from based_jax import config as configs
from based_jax.folders import check_file, make_folder
from based_jax.revision import revision
from based_jax.store import StoreError
from based_jax.sweep import rows
from based_jax.sweep.checks import check_groups, check_pass
from based_jax.sweep.measures import Deadline, MeasuredRun, MeasuresOf, NoTimeLeft
from based_jax.sweep.points import Point
from based_jax.sweep.processes import SPAWN_CONTEXT, checked_apart, sent_by_process
from based_jax.sweep.schedule import Group, Progress, SweepOptions, work_off
from based_jax.sweep.trial import TRACED_KEYS, Sweep
from based_jax.train.loop import DivergedError, train
from based_jax.train.mesh_checks import check_mesh
from based_jax.train.run import TrainConfig
from based_jax.train.workdir import wait_for_trainings

LOG_FILE = "log.txt"
"""Of a workdir: what its run printed."""
RUN_PROCESS_NAME = "run of a sweep"
LEFT = "left for the next time"
SHARED_DEVICE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The environment of runs that are under way together: what waits or compiles leaves the memory to what trains."""


class RunCall(NamedTuple):
    """What the process of a run is told, apart from its config.

    Attributes:
      workdir: of the run.
      name, command: of the sweep, for its row.
      deadline: by when it is to have been trained, if it is measured.
      measures: what its row gets besides.
    """

    workdir: Path
    name: str
    command: str
    deadline: Deadline
    measures: MeasuresOf | None


class RunEngine:
    """Trains each point of a sweep as a whole run on all devices that are visible."""

    def __init__(self, sweep: Sweep):
        self._sweep = sweep

    def groups(self) -> list[Group]:
        """Return each point alone, in their order."""
        return [[found] for found in self._sweep.trials()]

    def check(self, points: Group) -> None:
        """Raise UserError if a run cannot be trained on the devices."""
        values = [(point, configs.to_dict(config)) for point, config in points]
        checked_apart(SPAWN_CONTEXT, _check_runs, values, self._sweep.measures)

    def place(self, options: SweepOptions) -> str:
        """Return where runs are trained, in words."""
        number = options.workers or 1
        at_once = f"{number} at a time" if self._sweep.measures is None else f"one at a time, {number} under way"
        return f"each a run in a process of its own, {at_once}"

    def prepare(self, points: Group, starmap: Callable) -> None:
        """Do nothing: what runs share, their data, is kept on the disk by the first one."""

    def train(self, progress: Progress, name: str, options: SweepOptions) -> None:
        """Train points until none is left, `options.workers` of them at a time, one by default."""
        train_point = functools.partial(_train_point, progress, name, options, self._sweep)
        number = options.workers or 1
        if number > 1:
            os.environ.update({key: value for key, value in SHARED_DEVICE.items() if key not in os.environ})
        try:
            work_off(progress, [train_point] * number, parallel=number)
        except StoreError:
            _ask_runs_to_stop()
            raise


def _check_runs(points: list[tuple[Point, dict[str, Any]]], measures: MeasuresOf | None) -> None:
    """Check what runs need before their first step, once for all that differ in traced values alone."""
    if measures is not None and points:
        measures(configs.build(TrainConfig, points[0][1]))
    found: dict[str, Group] = {}
    for point, values in points:
        flat = {key: value for key, value in flatten_dict(values, sep=".").items() if key not in TRACED_KEYS}
        found.setdefault(configs.config_id(flat), []).append((point, configs.build(TrainConfig, values)))
    check_groups(list(found.values()), _check_run)


def _check_run(config: TrainConfig) -> None:
    mesh = parallel.make_mesh(config.mesh)
    check_mesh(config, mesh)
    check_pass(config, config.steps, config.data.longest_test, mesh)
    config.data.open(config.batch_size)  # says what it has too little of; text is packed here, for all runs


def _ask_runs_to_stop() -> None:
    """Let the runs of this process save and stop, as a signal does."""
    for process in multiprocessing.active_children():
        if process.name == RUN_PROCESS_NAME:
            process.terminate()


def _train_point(progress: Progress, name: str, options: SweepOptions, sweep: Sweep, group: Group) -> None:
    [(point, config)] = group
    store = progress.store.path
    workdir, deadline = store / "runs" / config.id, Deadline(options.until, store, name)
    call = RunCall(workdir, name, options.command, deadline, sweep.measures)
    run = point, configs.to_dict(config), call
    row = sent_by_process(SPAWN_CONTEXT, _train_and_send, *run, process_name=RUN_PROCESS_NAME)
    if isinstance(row, str):
        raise RuntimeError(row)
    if row is not None:
        progress.finish(row, rows.run_line(point, config, row))
        if not sweep.keep_runs:
            shutil.rmtree(workdir, ignore_errors=True)


def _train_and_send(sender: connection.Connection, point: Point, values: dict[str, Any], call: RunCall) -> None:
    """Train a point in this process, and send its row, or why there is none; nothing where no time is left for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent ends of it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    revision()  # of the code that this process has imported: files may change until its row is made
    try:
        make_folder(call.workdir)
        _print_into(call.workdir / LOG_FILE)
        if compilation.FOLDER_VARIABLE in os.environ:
            compilation.keep()
        wait_for_trainings(call.workdir)  # that of a command which was killed saves before it stops
        config = configs.build(TrainConfig, values)
        trained = _trained(point, config, call) if call.measures is None else _measured(point, config, call, sender)
        sender.send(trained | rows.facts_of(call.name, call.command))
    except NoTimeLeft as left:
        _leave(sender, str(left))
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(BrokenPipeError):  # nobody is left to be told
            sender.send(f"{type(error).__name__}: {error} ({call.workdir / LOG_FILE})")
    if call.measures is not None:
        _exit()


def _trained(point: Point, config: TrainConfig, call: RunCall) -> dict[str, Any]:
    """Return the row of a point after it has been trained."""
    begin = time.perf_counter()
    try:
        results = _results_of(train(config, call.workdir))
    except DivergedError:
        results = None
    return rows.run_row(point, config, results, time.perf_counter() - begin)


def _measured(point: Point, config: TrainConfig, call: RunCall, sender: connection.Connection) -> dict[str, Any]:
    """Return the row of a point after it has been trained, and measured unless it diverged."""
    assert call.measures is not None
    run, found = MeasuredRun(call.measures(config), call.deadline), dict[str, Any]()
    threading.Thread(target=_leave_unbegun, args=(sender, run, call.deadline.until), daemon=True).start()
    try:
        results = _results_of(train(config, call.workdir, run.turn))
        found = run.measured(call.workdir)
    except DivergedError:
        results = None
    return rows.run_row(point, config, results, 0.0) | run.facts() | found


def _leave_unbegun(sender: connection.Connection, run: MeasuredRun, until: float) -> None:
    """End this process, whatever it compiles, if its run has not had its turn by a time, or by its parent's end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    ended = connection.wait([parent.sentinel], None if until == math.inf else max(until - time.time(), 0))
    if run.begun:
        return
    if ended:
        os._exit(1)
    _leave(sender, "it was not ready in time")


def _leave(sender: connection.Connection, why: str) -> None:
    print(f"{LEFT}: {why}")
    sender.send(None)
    _exit()


def _exit() -> None:
    """End this process at once: a thread that compiles what is not needed any more would be waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _results_of(results: dict[str, float]) -> dict[str, float]:
    if not results:
        raise RuntimeError("stopped by a signal; the same command goes on from there")
    return results


def _print_into(path: Path) -> None:
    """Append to a file what this process prints from now on."""
    if path.exists():
        check_file(path)
    with path.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(encoding="utf-8", errors="backslashreplace")


def _end_with_parent() -> None:
    """Ask this process to save and stop, once, when the one that started it has ended, however it did."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)

"""The engine of whole runs: each point is a run in a process of its own, with a workdir below the store.

A run that was stopped goes on from its checkpoint, and one that fails takes no other with it. This process makes no use
of a device, which would leave none of it to its runs.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from based_jax import config as configs
from based_jax import parallel
from based_jax.folders import check_file, make_folder
from based_jax.revision import revision
from based_jax.store import StoreError
from based_jax.sweep import rows
from based_jax.sweep.checks import check_groups, check_pass
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


class RunEngine:
    """Trains each point as a whole run on all devices that are visible."""

    def groups(self, sweep: Sweep) -> list[Group]:
        """Return each point alone, in their order."""
        return [[found] for found in sweep.trials()]

    def check(self, points: Group) -> None:
        """Raise UserError if a run cannot be trained on the devices."""
        checked_apart(SPAWN_CONTEXT, _check_runs, [(point, configs.to_dict(config)) for point, config in points])

    def place(self, options: SweepOptions) -> str:
        """Return where runs are trained, in words."""
        return f"each a run in a process of its own, {options.workers or 1} at a time"

    def prepare(self, points: Group, starmap: Callable) -> None:
        """Do nothing: what runs share, their data, is kept on the disk by the first one."""

    def train(self, progress: Progress, name: str, options: SweepOptions) -> None:
        """Train points until none is left, `options.workers` of them at a time, one by default."""
        train_point = functools.partial(_train_point, progress, name, options.command)
        number = options.workers or 1
        try:
            work_off(progress, [train_point] * number, parallel=number)
        except StoreError:
            _ask_runs_to_stop()
            raise


def _check_runs(points: list[tuple[Point, dict[str, Any]]]) -> None:
    """Check what runs need before their first step, once for all that differ in traced values alone."""
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


def _train_point(progress: Progress, name: str, command: str, group: Group) -> None:
    [(point, config)] = group
    workdir = progress.store.path / "runs" / config.id
    run = point, configs.to_dict(config), workdir, name, command
    row = sent_by_process(SPAWN_CONTEXT, _train_and_send, *run, process_name=RUN_PROCESS_NAME)
    if not isinstance(row, dict):
        raise RuntimeError(row)
    progress.finish(row, rows.run_line(point, config, row))


def _train_and_send(
    sender: connection.Connection, point: Point, values: dict[str, Any], workdir: Path, name: str, command: str
) -> None:
    """Train a point in this process, and send its row, or why there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent ends of it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    revision()  # of the code that this process has imported: files may change until its row is made
    try:
        make_folder(workdir)
        _print_into(workdir / LOG_FILE)
        wait_for_trainings(workdir)  # that of a command which was killed saves before it stops
        config = configs.build(TrainConfig, values)
        sender.send(_trained(point, config, workdir) | rows.facts_of(name, command))
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(BrokenPipeError):  # nobody is left to be told
            sender.send(f"{type(error).__name__}: {error} ({workdir / LOG_FILE})")


def _trained(point: Point, config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Return the row of a point after it has been trained."""
    begin = time.perf_counter()
    try:
        results = train(config, workdir)
    except DivergedError:
        return rows.run_row(point, config, None, time.perf_counter() - begin)
    if not results:
        raise RuntimeError("stopped by a signal; the same command goes on from there")
    return rows.run_row(point, config, results, time.perf_counter() - begin)


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

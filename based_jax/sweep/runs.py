"""The engine of whole runs: each point is a run in a process of its own, with a workdir below the store.

A run that was stopped goes on from its checkpoint, and one that fails takes no other with it. This process makes no use
of a device, which would leave none of it to its runs.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import filelock

from based_jax import config as configs
from based_jax.sweep import rows
from based_jax.sweep.points import Point
from based_jax.sweep.schedule import Group, Progress, SweepOptions, work_off
from based_jax.sweep.trial import Sweep
from based_jax.train.loop import DivergedError, train
from based_jax.train.run import TrainConfig

LOG_FILE, LOCK_FILE = "log.txt", "lock"
"""Of a workdir: what its run printed, and held by it: one that is stopped saves first, and the next one waits."""
SPAWN_CONTEXT = multiprocessing.get_context("spawn")  # a process that was forked cannot use a device


class RunEngine:
    """Trains each point as a whole run on all devices that are visible."""

    def groups(self, sweep: Sweep) -> list[Group]:
        """Return each point alone, in their order."""
        return [[found] for found in sweep.trials()]

    def prepare(self, sweep: Sweep, starmap: Callable) -> None:
        """Do nothing: what runs share, their data, is kept on the disk by the first one."""

    def train(self, progress: Progress, name: str, options: SweepOptions) -> None:
        """Train points until none is left, `options.workers` of them at a time, one by default."""
        train_point = functools.partial(_train_point, progress, name, options.command)
        work_off(progress, [train_point] * (options.workers or 1))


def _train_point(progress: Progress, name: str, command: str, group: Group) -> None:
    [(point, config)] = group
    workdir = progress.store.path / "runs" / config.id
    row = _sent_by_process(_train_and_send, point, configs.to_dict(config), workdir, name, command)
    progress.finish(row, rows.run_line(point, config, row))


def _sent_by_process(target: Callable, *arguments: Any) -> dict[str, Any]:
    """Return what a process sends.

    Raises:
      RuntimeError: it sends why it failed, or ends without a word.
    """
    receiver, sender = SPAWN_CONTEXT.Pipe(duplex=False)
    process = SPAWN_CONTEXT.Process(target=target, args=(sender, *arguments))
    process.start()
    sender.close()  # the other end is the process's alone: its end is the end of the file
    found = None
    with contextlib.suppress(EOFError):
        found = receiver.recv()
    process.join()
    if not isinstance(found, dict):
        raise RuntimeError(found or f"the process ended with exit code {process.exitcode}")
    return found


def _train_and_send(
    sender: connection.Connection, point: Point, values: dict[str, Any], workdir: Path, name: str, command: str
) -> None:
    """Train a point in this process, and send its row, or why there is none."""
    workdir.mkdir(parents=True, exist_ok=True)
    _print_into(workdir / LOG_FILE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent ends of it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with filelock.FileLock(workdir / LOCK_FILE):
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
    with path.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _end_with_parent() -> None:
    """Ask this process to save and stop, once, when the one that started it has ended, however it did."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)

"""Commands on a store whose groups are trained by sleeping: for claims, without any device."""

import contextlib
import dataclasses
import functools
import multiprocessing
import time
from pathlib import Path

from based_jax import config as configs
from based_jax.commands.sweep import _interruptible
from based_jax.store import Store
from based_jax.sweep import claims, schedule
from based_jax.sweep.schedule import Progress, Todo, work_off
from based_jax.train.run import TrainConfig

BASE = {
    "model": {"layers": (("base_conv", {}),), "d_model": 8, "vocab_size": 40, "dtype": "float32"},
    "data": {"kind": "mqar", "preset": "tiny", "vocab_size": 40},
    "optim": {"warmup_steps": 1},
    "steps": 2,
}
TRAINED, SAID = "trained.txt", "said.txt"
"""Of a store: a line for each group that was trained to its end, and what commands have printed."""
ELSEWHERE = "filelock/2\npid=3\nhost=elsewhere\nmode=lease\ntoken=aa\nduration=0.3\n"
"""The claim of another host."""
SERVER_CONTEXT = multiprocessing.get_context("forkserver")  # imports once, and makes use of no device
SERVER_CONTEXT.set_forkserver_preload(["tests.helpers.claims"])


@functools.cache
def _config() -> TrainConfig:
    return configs.build(TrainConfig, BASE)


def groups(number):
    """Return so many groups of one point each."""
    return [[({"seed": seed}, dataclasses.replace(_config(), seed=seed))] for seed in range(number)]


def start(store, number, seconds):
    """Start a command on a store that trains so many groups, two at a time, so many seconds each."""
    process = SERVER_CONTEXT.Process(target=_fill, args=(store.path, number, seconds))
    process.start()
    return process


def _fill(path: Path, number: int, seconds: float) -> None:
    store = Store(path)

    def train(group):
        [(_, config)] = group
        time.sleep(seconds)
        with (path / TRAINED).open("a") as file:
            file.write(f"{config.id}\n")
        progress.finish({"id": config.id, "seconds": seconds}, config.id)

    schedule.SECONDS_BETWEEN_LOOKS, claims.UNWRITTEN_SECONDS = 0.05, 0.2
    path.mkdir(parents=True, exist_ok=True)
    with (
        (path / SAID).open("a", buffering=1) as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        progress = Progress(Todo(groups(number), store), store, print)
        _interruptible(work_off, progress, [train] * 2)

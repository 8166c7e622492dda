"""Trainings of several processes on this host, each with CPU devices of its own, as a user starts them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax

from based_jax import config as configs
from based_jax import parallel
from based_jax.train.compile import train_program
from based_jax.train.run import TrainConfig

BASE = {
    "model": {
        "layers": [["conv", {}], ["attention", {"num_heads": 2}]],
        "d_model": 16,
        "vocab_size": 64,
        "dtype": "float32",
    },
    "data": {"kind": "mqar", "preset": "tiny"},
    "optim": {"warmup_steps": 0, "lr": 1e-2},
    "batch_size": 8,
    "log_every": 1,
    "seed": 3,
}


def free_port() -> int:
    """Return a port of this host that nobody listens at."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


class Processes:
    """A training that so many processes run together, with so many devices each; it begins, or goes on, at once.

    All but process 0 get `more` arguments.
    """

    def __init__(self, folder: Path, config: dict, processes: int, devices: int = 1, command: str = "train", more=()):
        port = free_port()
        path = folder / f"config_{port}.py"
        path.write_text(f"def get_config():\n    return {config!r}\n")
        self.workdir = folder / "run"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        words = [sys.executable, "-m", "based_jax", command, f"--workdir={self.workdir}"]
        words += [f"--config={path}"] if command == "train" else []
        words += [f"--coordinator=localhost:{port}", f"--num-processes={processes}"]
        self.all = [
            subprocess.Popen(
                [*words, f"--process-id={number}", *(more if number else ())],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(processes)
        ]

    def kill(self) -> None:
        """End the processes that have not ended, after a test that failed, say."""
        for process in self.all:
            process.kill()
            process.wait()

    def rows(self) -> list[dict]:
        """Return the rows of training steps."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if "loss" in row]

    def losses(self) -> list[float]:
        """Return the losses of all steps, which follow each other."""
        rows = self.rows()
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]

    def ends(self) -> list[tuple[int, str]]:
        """Return the exit code and the last line of each process' stderr, when all have ended."""
        self.said = [process.communicate(timeout=150) for process in self.all]
        last = [(stderr.splitlines() or [""])[-1] for _, stderr in self.said]
        return [(process.returncode, line) for process, line in zip(self.all, last, strict=True)]

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics have the row of a step."""
        while not any(row["step"] >= step for row in self.rows()):
            assert all(process.poll() is None for process in self.all), self.ends()
            time.sleep(0.1)


def losses_of_one_process(config: dict, devices: int, steps: int | None = None) -> list[float]:
    """Return the losses of the first steps of a config, all if None, on so many devices of this process."""
    built = configs.build(TrainConfig, config)
    program = train_program(built, parallel.make_mesh(built.mesh, jax.devices()[:devices]))
    source, feed = built.data.open(built.batch_size), parallel.Feed(program.mesh, built.batch_size)
    state, losses = program.initial_state(), []
    for step in range(steps or built.steps):
        state, metrics = program.step(state, feed.arrays(source.batch(step)))
        losses.append(float(metrics["loss"]))
    return losses

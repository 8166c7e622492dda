"""Commands of the package on some of this host's devices, and what trainings leave in their folders."""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from based_jax.errors import UserError
from based_jax.sweep.launch import visible_gpus

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
SHOWN_CHARACTERS = 1500
"""Of what a command that failed said last."""


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Declare the number of devices and where rows and runs go."""
    parser.add_argument("--devices", type=int, default=2, help="GPUs of this host (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / out, help=f"JSON rows (default: results/{out})")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder, or a new one, for the runs")


def new_folder(folder: Path) -> Path:
    """Make a folder for runs and return it; UserError where something is in it."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty; name another folder for the runs.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def gpus(devices: int) -> list[str] | None:
    """Return what CUDA calls the first devices; None where there are no GPUs, and CPU devices take their place.

    Raises:
      UserError: there are fewer.
    """
    found = visible_gpus()
    if found and len(found) < devices:
        raise UserError(f"--devices is {devices}; {len(found)} GPUs are there.")
    return found[:devices] if found else None


def environment(places: Sequence[int], devices: int) -> dict[str, str]:
    """Return the environment of a process that sees some of so many devices, by their places."""
    names = gpus(devices)
    if names is None:
        return {"JAX_NUM_CPU_DEVICES": str(len(places)), "JAX_PLATFORMS": "cpu"}
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[i] for i in places)}


def begun(words: Sequence[str], more: Mapping[str, str], log: Path) -> subprocess.Popen:
    """Begin a command of the package, whose output goes to a file."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "based_jax", *words]
        return subprocess.Popen(command, env=os.environ | dict(more), stdout=file, stderr=subprocess.STDOUT)


def done(process: subprocess.Popen, log: Path) -> None:
    """Wait for a command; RuntimeError with what it said last where it failed."""
    if process.wait():
        raise RuntimeError(f"exit code {process.returncode}: {log.read_text()[-SHOWN_CHARACTERS:]}")


def rows(workdir: Path) -> Iterator[dict]:
    """Yield the rows of training steps that a run has written."""
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if "loss" in row:
            yield row


def losses(workdir: Path) -> dict[int, float]:
    """Return the losses of a run by step."""
    return {row["step"]: row["loss"] for row in rows(workdir)}


def free_port() -> int:
    """Return a port of this host that nobody listens at."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def facts(workdir: Path) -> dict[str, str]:
    """Return the device of a run's rows."""
    return {"device": next((row["device"] for row in rows(workdir) if "device" in row), "unknown")}

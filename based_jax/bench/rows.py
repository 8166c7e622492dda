"""What every row of results names, and the file of JSON lines that rows go to."""

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from based_jax.folders import make_folder, writing


def facts() -> dict:
    """Return device, versions and command."""
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {library: importlib.metadata.version(library) for library in ("jax", "jaxlib")},
        "command": command_line(),
    }


def command_line() -> str:
    """Return the command; it does not wake the GPU, whose memory other processes may be meant to hold."""
    return " ".join(["python -m based_jax", *sys.argv[1:]])


@contextlib.contextmanager
def appended(path: Path | None) -> Iterator[Callable[[dict], None]]:
    """Return a function that appends a row to a file, at once; without a path to none."""
    if path is None:
        yield lambda row: None
        return
    make_folder(path.parent)
    with writing(path):
        file = path.open("a")

    def write(row: dict) -> None:
        with writing(path):
            print(json.dumps(row), file=file, flush=True)

    with file:
        yield write


@contextlib.contextmanager
def replaced(path: Path | None) -> Iterator[Callable[[dict], None]]:
    """Return the same of a file that is begun anew."""
    if path is not None:
        path.unlink(missing_ok=True)
    with appended(path) as write:
        yield write

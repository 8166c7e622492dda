"""What every row of results names, and the file of JSON lines that rows go to."""

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from based_jax.errors import UserError
from based_jax.folders import make_folder, writing
from based_jax.revision import command, revision


def facts(*libraries: str) -> dict:
    """Return device, versions, those of more libraries too, flags of XLA if there are any, revision and command."""
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {library: importlib.metadata.version(library) for library in ("jax", "jaxlib", *libraries)},
        **({"xla_flags": flags} if (flags := os.environ.get("XLA_FLAGS")) else {}),
        **origin(),
    }


def origin() -> dict:
    """Return revision and command; no device wakes, whose memory other processes may be meant to hold."""
    return {"revision": revision(), "command": command()}


def read(path: Path) -> list[dict]:
    """Return the rows of a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def appended(path: Path | None) -> Iterator[Callable[[dict], None]]:
    """Return a function that appends a row to a file, at once; without a path to none."""
    if path is None:
        yield lambda row: None
        return
    revision()  # before the first row is made: files of the code may change until it is written
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
    """Return the same of a file that is begun anew, with the first row: until then what it held stays.

    Raises:
      UserError: it holds something else than rows.
    """
    if path is None:
        yield lambda row: None
        return
    revision()  # as in `appended`
    _check_rows(path)
    with contextlib.ExitStack() as stack:
        files: list[Callable[[dict], None]] = []

        def write(row: dict) -> None:
            if not files:
                path.unlink(missing_ok=True)
                files.append(stack.enter_context(appended(path)))
            files[0](row)

        yield write


def _check_rows(path: Path) -> None:
    """Check that a file that is to be replaced holds rows, or nothing, lest a config or a text is lost."""
    if path.exists():
        with writing(path), path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):
                raise UserError(f"'{path}' holds something else than rows; name another file, or remove it.")

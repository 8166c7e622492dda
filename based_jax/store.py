"""An append-only store of results: JSON lines in a folder, one file per writer, so that no writer waits for another.

A row is on the disk, or is not a row: a line that a killed writer left unfinished is passed over. Nothing is locked,
so the folder may lie on a file system that many machines share.
"""

import contextlib
import json
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from based_jax.errors import UserError
from based_jax.folders import local_path, read_file, reason

PROBE_BYTES = 1 << 16
"""What a disk must have room for before anything is trained: a row with a long curve."""


class StoreError(UserError, OSError):
    """A store that cannot be written or read."""


class Store:
    """The rows of a folder (or of one file, to read), each with its own "id".

    Raises:
      UserError: the path is empty or an address; on reading, a line that is not the last of its file is no JSON object
        with an id.
      StoreError: on writing and reading, what the file system says.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = local_path(path, "store")
        self._file: int | None = None

    def check_writable(self) -> None:
        """Check that rows can be written, and leave no trace of it.

        Raises:
          StoreError: the path or a part of it is a file, or may not be written, or the disk is full.
        """
        with self._told("written"):
            folder = next(path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path))
            if not folder.is_dir():
                raise StoreError(f"Store '{self.path}' cannot be written: '{folder}' is no folder.")
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; it is on the disk when this returns."""
        line = (json.dumps(row) + "\n").encode()
        with self._told("written"):
            if self._file is not None and os.fstat(self._file).st_nlink == 0:
                self._forget_file()  # somebody has removed it
                if not self.path.is_dir():
                    raise StoreError(f"Store '{self.path}' has been removed, and its rows with it.")
            if self._file is None:
                self._file = self._create()
            try:
                if os.write(self._file, line) < len(line):
                    raise StoreError(f"Store '{self.path}' took a part of a row: the disk is full.")
                os.fsync(self._file)
            except OSError:
                self._forget_file()  # what was written of the row ends it
                raise

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows by file name and line, the first of each id."""
        found: dict[str, dict[str, Any]] = {}
        with self._told("read"):
            files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.jsonl"))
            for file in files:
                for row in _read(file):
                    found.setdefault(row["id"], row)
        return list(found.values())

    def ids(self) -> set[str]:
        """Return the ids of all rows."""
        return {row["id"] for row in self.rows()}

    def _create(self) -> int:
        """Create this writer's own file, and see to it that the folder knows it."""
        self.path.mkdir(parents=True, exist_ok=True)
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        file = os.open(self.path / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return file

    def _forget_file(self) -> None:
        """Close this writer's file: the next row begins another one."""
        assert self._file is not None
        os.close(self._file)
        self._file = None

    @contextlib.contextmanager
    def _told(self, done: str) -> Iterator[None]:
        """Say in one sentence what the file system says."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"Store '{self.path}' cannot be {done}: {reason(error)}.") from error


def _read(file: Path) -> list[dict[str, Any]]:
    lines = read_file(file).split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row_of(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):  # the last is empty, or what a killed writer left
            raise UserError(f"Line {number} of '{file}' is no row: {line[:60].decode(errors='backslashreplace')!r}.")
    return rows


def _row_of(line: bytes) -> dict[str, Any] | None:
    """Return the row that a line is, or None."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("id"), str) else None

"""An append-only store of results: JSON lines in a folder, one file per writer, so that no writer waits for another.

A row is on the disk, or is not a row: a line that a killed writer left unfinished is passed over. Nothing is locked,
so the folder may lie on a file system that many machines share.
"""

import json
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from based_jax.errors import UserError


class Store:
    """The rows of a folder (or of one file, to read), each with its own "id".

    Raises:
      UserError: on reading, a line that is not the last of its file is no JSON object with an id.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; it is on the disk when this returns."""
        line = (json.dumps(row) + "\n").encode()
        if self._file is None:
            self._file = self._create()
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(f"'{self.path}' took a part of a row: the disk is full.")
            os.fsync(self._file)
        except OSError:
            # What was written of the row ends this file: the next row begins another one.
            os.close(self._file)
            self._file = None
            raise

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows by file name and line, the first of each id."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.jsonl"))
        found: dict[str, dict[str, Any]] = {}
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
        os.fsync(folder)
        os.close(folder)
        return file


def _read(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["id"]
        except (ValueError, TypeError, KeyError):
            if number < len(lines):  # the last is empty, or what a killed writer left
                raise UserError(f"Line {number} of '{file}' is no row: {line[:60]!r}.") from None
            continue
        rows.append(row)
    return rows

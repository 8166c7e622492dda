"""The files that a run appends to, rows and TensorBoard events: what a full disk cuts off is no row."""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from based_jax.errors import UserError
from based_jax.folders import UnwritableError, read_file, reason, writing

EVENTS_FLUSH_SECONDS = 30.0


class RowFile(contextlib.AbstractContextManager):
    """A file of rows, a JSON object a line, each written whole or not at all."""

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            self._file = path.open("ab", buffering=0)

    def __exit__(self, *exc_info):
        self._file.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row.

        Raises:
          UserError: the file system refuses; the file then ends with the row before.
        """
        begin = self._file.seek(0, os.SEEK_END)
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with writing(self.path):
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(begin)
                raise


class EventFile(contextlib.AbstractContextManager):
    """TensorBoard events of one process, written as they come: an error is raised where it happens.

    Args:
      folder: where TensorBoard looks.
      first_step: events of this step and later ones, of processes before, are hidden.
    """

    def __init__(self, folder: Path, first_step: int):
        self._path = folder / "events"
        self._flushed = 0.0
        with self._writing():
            self._file = EventsWriter(str(self._path), f".{os.getpid()}.{first_step}")
            if first_step:
                self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def __exit__(self, error, *_):
        try:
            with self._writing():
                self._file.close()
        except UnwritableError:
            if error is None:  # else it is told already what is wrong
                raise

    def add(self, scalars: Mapping[str, Any], step: int) -> None:
        """Write numbers by their names.

        Raises:
          UserError: the file system refuses.
        """
        with self._writing():
            for name, value in scalars.items():
                self._write(Event(step=step, summary=summary.scalar(name, value)))

    def add_text(self, name: str, text: str, step: int) -> None:
        """Write a text; raises as `add`."""
        with self._writing():
            self._write(Event(step=step, summary=summary.text(name, text)))

    def _write(self, event: Event) -> None:
        now = event.wall_time = time.time()
        self._file.write_event(event)
        if now - self._flushed > EVENTS_FLUSH_SECONDS:
            self._file.flush()
            self._flushed = now

    def _writing(self):
        return writing(f"{self._path}.out.tfevents")


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """Return the step and the text of each whole line of a file of rows; none where there is no file.

    Raises:
      UserError: a line is no row, or the file cannot be read.
    """
    try:
        lines = read_file(path).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {reason(error)}.") from error
    return [(_step_of(line, path), line) for line in lines if line.endswith(b"\n")]


def set_rows_aside(step: int, path: Path) -> Path | None:
    """Move the rows of this step and later ones, which no checkpoint holds, from a file into one beside it.

    Half a line, of a process that was killed, is dropped.

    Returns:
      The file that now has them, or None where there are none.

    Raises:
      UserError: the file holds something else, or cannot be read, or the file system refuses.
    """
    rows = read_lines(path)
    later = next((i for i, (row_step, _) in enumerate(rows) if row_step >= step), len(rows))
    kept, moved = ([line for _, line in part] for part in (rows[:later], rows[later:]))
    aside = path.with_name(f"{path.stem}_set_aside_from_step_{step}{path.suffix}") if moved else None
    if aside:
        with writing(aside), aside.open("ab") as file:
            file.writelines(moved)
    if path.exists():
        with writing(path):
            os.truncate(path, sum(map(len, kept)))
    return aside


def _step_of(line: bytes, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(
            f"'{path}' holds a line that is no row of metrics: {line[:60]!r}; move the file away."
        ) from None

"""Where the wall time of a run went, by phase, over all the processes that trained it one after another.

A run writes its times with every checkpoint (`goodput.jsonl`). A later process goes on from those of the checkpoint
that it continues; what was trained after that, and has to be trained again, is lost.
"""

import contextlib
import json
import math
import time
from pathlib import Path

from based_jax.errors import UserError
from based_jax.train.files import RowFile, read_lines, set_rows_aside
from based_jax.train.workdir import GOODPUT_FILE, METRICS_FILE

PHASES = ("init", "compile", "data", "step", "eval", "checkpoint", "lost")


class Timer:
    """Wall time of a run by phase, and the share of it that steps took (goodput).

    Each call of `done` books the time since the one before, so nothing is counted twice:

        batch = next(batches)
        timer.done("data")

    Attributes:
      seconds: by phase; "compile" is the first step of each process, "lost" what processes trained that were killed.
      lost_steps: how many those were.
    """

    def __init__(self):
        self._last = time.monotonic()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.lost_steps = 0

    def done(self, phase: str) -> None:
        """Add the time since the last call, or since the start, to a phase of `PHASES`."""
        now = time.monotonic()
        self.seconds[phase] += now - self._last
        self._last = now

    def split(self) -> dict[str, float]:
        """Return seconds as 'time/<phase>', 'lost_steps', and 'goodput': steps' share of all that is booked, or 0."""
        total = sum(self.seconds.values())
        seconds = {f"time/{phase}": value for phase, value in self.seconds.items()}
        return seconds | {"lost_steps": self.lost_steps, "goodput": self.seconds["step"] / total if total else 0.0}


class TimesFile(contextlib.AbstractContextManager):
    """The times of a run in its workdir; process 0 alone opens one, before the rows of lost steps are set aside.

    Args:
      workdir: the run's.
      start: the step that this process goes on from.
      timer: of this process, which gets the times of those before it.

    Raises:
      UserError: a file that is there holds something else, or the file system refuses.
    """

    def __init__(self, workdir: Path, start: int, timer: Timer):
        path = workdir / GOODPUT_FILE
        before = [_times(line, path) for step, line in read_lines(path) if step <= start]
        if before:
            _add(timer, before[-1])
        if lost := [step for step, _ in read_lines(workdir / METRICS_FILE) if step > start]:
            timer.lost_steps += max(lost) - start
            if before:
                last_sign = (workdir / METRICS_FILE).stat().st_mtime
                timer.seconds["lost"] += max(last_sign - before[-1]["unix_time"], 0.0)
        set_rows_aside(start + 1, path)
        self._timer, self._rows = timer, RowFile(path)

    def __exit__(self, *exc_info):
        self._rows.__exit__(*exc_info)

    def write(self, step: int) -> None:
        """Write the times until the checkpoint of a step; UserError where the file system refuses."""
        self._rows.append({"step": step, **self._timer.split(), "unix_time": time.time()})


def _times(line: bytes, path: Path) -> dict[str, float]:
    """Return the numbers of a row."""
    row = {name: value for name, value in json.loads(line).items() if name != "step"}
    if "unix_time" not in row or not all(type(x) in (int, float) and math.isfinite(x) for x in row.values()):
        raise UserError(f"'{path}' holds a line that is no row of times: {line[:60]!r}; move the file away.")
    return row


def _add(timer: Timer, row: dict) -> None:
    for phase in PHASES:
        timer.seconds[phase] += row.get(f"time/{phase}", 0.0)
    timer.lost_steps += row.get("lost_steps", 0)

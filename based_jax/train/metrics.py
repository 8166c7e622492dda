"""What a run tells: rows in metrics.jsonl, TensorBoard events, a progress bar or plain lines, and where time went."""

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter
from tqdm import tqdm

from based_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
PHASES = ("init", "data", "step", "eval", "checkpoint")


class MetricWriter:
    """Appends rows of scalars to `workdir`/metrics.jsonl and their numbers to TensorBoard events; a context manager.

    A row is {"step": step, ...} on a line of its own, flushed at once; NaN and infinities are written as null. In a
    run of many processes only process 0 makes one.

    Args:
      workdir: made if missing.
      first_step: the first step that this process may write. Rows of that step and later ones, which a stopped run
        left after its last checkpoint, are dropped, and so is a half-written line; 0 starts an empty file.

    Raises:
      UserError: the file that is there holds something else.
    """

    def __init__(self, workdir: str | os.PathLike, first_step: int = 0):
        Path(workdir).mkdir(parents=True, exist_ok=True)
        path = Path(workdir) / METRICS_FILE
        _keep_rows_before(first_step, path)
        self._rows = path.open("a")
        self._events = SummaryWriter(str(workdir), purge_step=first_step or None)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row.

        Args:
          step: the step that the values belong to.
          values: by name, numbers (0-d arrays too) or strings; TensorBoard receives the numbers.
        """
        row = {name: _scalar(value) for name, value in values.items()}
        finite = {name: _finite(value) for name, value in row.items()}
        self._rows.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._rows.flush()
        for name, value in row.items():
            if not isinstance(value, str):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._rows.close()
        self._events.close()


class Bar:
    """Progress for a terminal: one bar that is redrawn, with the values behind it."""

    def __init__(self, total: int, first_step: int, stream: TextIO):
        self._bar = tqdm(total=total, initial=first_step, file=stream, dynamic_ncols=True, unit=" steps")

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show that `step` steps are done, and the values of the last one."""
        self._bar.set_postfix_str(_shown(values), refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.write(message, file=self._bar.fp)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class Lines:
    """Progress for a pipe or a file: a line per update, with the time that the rest will take at the speed so far."""

    def __init__(self, total: int, first_step: int, stream: TextIO):
        self._total, self._first, self._stream, self._start = total, first_step, stream, time.monotonic()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Print that `step` steps are done, and the values of the last one."""
        per_step = (time.monotonic() - self._start) / max(step - self._first, 1)
        eta = datetime.timedelta(seconds=round(per_step * (self._total - step)))
        self.say(f"step {step}/{self._total} eta {eta} {_shown(values)}".rstrip())

    def say(self, message: str) -> None:
        """Print a line."""
        print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Do nothing: every line is complete."""


def progress(total: int, first_step: int = 0, stream: TextIO | None = None) -> Bar | Lines:
    """Return the progress of a run for a stream, standard output if None: a bar on a terminal, lines elsewhere.

    Args:
      total: steps of the whole run.
      first_step: steps that were done before this process started.
      stream: where to print.
    """
    stream = stream or sys.stdout
    return (Bar if stream.isatty() else Lines)(total, first_step, stream)


class Timer:
    """Wall time of a run by phase, and the share of it that steps took (goodput).

    Each call of `done` books the time since the one before, so nothing is counted twice:

        batch = next(batches)
        timer.done("data")
    """

    def __init__(self):
        self._start = self._last = time.monotonic()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def done(self, phase: str) -> None:
        """Add the time since the last call, or since the start, to a phase of `PHASES`."""
        now = time.monotonic()
        self.seconds[phase] += now - self._last
        self._last = now

    def split(self) -> dict[str, float]:
        """Return seconds as 'time/<phase>', and 'goodput': steps' fraction of what is booked (0 before anything is)."""
        total = self._last - self._start
        seconds = {f"time/{phase}": value for phase, value in self.seconds.items()}
        return seconds | {"goodput": self.seconds["step"] / total if total else 0.0}


def _keep_rows_before(first_step: int, path: Path) -> None:
    """Cut a metrics file at the first row that is later or not whole."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n") or _step_of(line, path) >= first_step:
                break
            kept += len(line)
        file.truncate(kept)


def _step_of(line: bytes, path: Path) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"'{path}' holds a line that is no row of metrics: {line[:60]!r}; move the file away."
        ) from None


def _scalar(value: Any) -> float | int | str:
    """Return a Python scalar for a scalar of any kind."""
    return value.item() if hasattr(value, "item") else value


def _finite(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(values: Mapping[str, Any]) -> str:
    scalars = {name: _scalar(value) for name, value in values.items()}
    return " ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in scalars.items()
    )

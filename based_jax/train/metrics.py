"""What a run tells: rows in metrics.jsonl, TensorBoard events, a progress bar or plain lines."""

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from based_jax.folders import local_path, make_folder, writing
from based_jax.train.files import EventFile, RowFile, read_lines, set_rows_aside
from based_jax.train.workdir import METRICS_FILE, SAMPLES_FILE


class MetricWriter:
    """Appends rows of scalars to `workdir`/metrics.jsonl and their numbers to TensorBoard events; a context manager.

    A row is {"step": step, ...} on a line of its own, flushed at once; NaN and infinities are written as null. In a
    run of many processes only process 0 makes one.

    Args:
      workdir: made if missing.
      first_step: the first step that this process may write. Rows of that step and later ones, which a stopped run
        left after its last checkpoint, are set aside (`set_aside`), and half a line is dropped; 0 sets all aside.

    Raises:
      UserError: the file that is there holds something else, or the file system refuses.
    """

    def __init__(self, workdir: str | os.PathLike, first_step: int = 0):
        self._folder = folder = local_path(workdir)
        make_folder(folder)
        with contextlib.ExitStack() as stack:
            self.set_aside = set_rows_aside(first_step, folder / METRICS_FILE)
            self._rows = stack.enter_context(RowFile(folder / METRICS_FILE))
            set_rows_aside(first_step, folder / SAMPLES_FILE)
            self._events = stack.enter_context(EventFile(folder, first_step))
            self._files = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._files.__exit__(*exc_info)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row.

        Args:
          step: the step that the values belong to.
          values: by name, numbers (0-d arrays too) or strings; TensorBoard receives the numbers.

        Raises:
          UserError: the disk is full, say; rows before this one are whole.
        """
        row = {name: _scalar(value) for name, value in values.items()}
        self._rows.append({"step": step, **{name: _finite(value) for name, value in row.items()}})
        self._events.add({name: value for name, value in row.items() if not isinstance(value, str)}, step)

    def write_sample(self, step: int, prompt: str, text: str) -> None:
        """Append what a model adds to a prompt to `workdir`/samples.jsonl and to TensorBoard; raises as `write`."""
        with RowFile(self._folder / SAMPLES_FILE) as samples:
            samples.append({"step": step, "prompt": prompt, "text": text})
        self._events.add_text(f"sample {prompt!r}", prompt + text, step)

    def close(self) -> None:
        """Flush and close both files; raises as `write`."""
        self._files.close()


def has_evaluation(workdir: str | os.PathLike, step: int) -> bool:
    """Return whether the metrics of a workdir have an evaluation of this step.

    Raises:
      UserError: the file holds something else, or cannot be read.
    """
    return any(row_step == step and b'"eval/' in row for row_step, row in read_lines(Path(workdir) / METRICS_FILE))


class Bar:
    """Progress for a terminal: one bar that is redrawn, with the values behind it."""

    def __init__(self, total: int, first_step: int, stream: TextIO):
        self._bar = tqdm(total=total, initial=first_step, file=stream, dynamic_ncols=True, unit=" steps")

    def begin(self, step: int) -> None:
        """Count time from here, where `step` steps are done: compilation, before it, tells nothing of the rest."""
        self._bar.initial = step
        self._bar.update(step - self._bar.n)
        self._bar.start_t = self._bar.last_print_t = self._bar._time()

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

    def begin(self, step: int) -> None:
        """Count time from here, where `step` steps are done: compilation, before it, tells nothing of the rest."""
        self._first, self._start = step, time.monotonic()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Print that `step` steps are done, and the values of the last one."""
        self.say(f"step {step}/{self._total} {self._eta(step)}{_shown(values)}".rstrip())

    def say(self, message: str) -> None:
        """Print a line; UnwritableError where it cannot be, since nobody reads, say."""
        with writing("standard output"):
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Do nothing: every line is complete."""

    def _eta(self, step: int) -> str:
        """Return what the rest will take; nothing where no step has been timed."""
        if step <= self._first:
            return ""
        per_step = (time.monotonic() - self._start) / (step - self._first)
        return f"eta {datetime.timedelta(seconds=round(per_step * (self._total - step)))} "


def progress(total: int, first_step: int = 0, stream: TextIO | None = None) -> Bar | Lines:
    """Return the progress of a run for a stream, standard output if None: a bar on a terminal, lines elsewhere.

    Args:
      total: steps of the whole run.
      first_step: steps that were done before this process started.
      stream: where to print.
    """
    stream = stream or sys.stdout
    return (Bar if stream.isatty() else Lines)(total, first_step, stream)


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

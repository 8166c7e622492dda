"""What workdirs tell of their runs: the curves of metrics.jsonl, and names that tell the runs apart."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict

from based_jax.config import CONFIG_FILE
from based_jax.errors import UserError
from based_jax.folders import local_path, read_file, reason
from based_jax.nn import names
from based_jax.train.metrics import METRICS_FILE

QUANTITIES = {
    "loss": "training loss",
    "eval/loss": "evaluation loss",
    "eval/accuracy": "evaluation accuracy",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
"""What is drawn, by its name in a row."""
MOST_POINTS = 2000
"""Of a curve that is drawn; of a longer one the extremes."""
LONGEST_NAME = 40
"""Of a run that is named by what differs in its config; in characters."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity by step; NaN where it was not finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def lost(self) -> np.ndarray:
        """The steps at which it was not finite."""
        return self.steps[np.isnan(self.values)]

    @property
    def lost_from(self) -> np.ndarray:
        """The steps from which on it was not finite."""
        lost = np.isnan(self.values)
        return self.steps[lost & ~np.concatenate([[False], lost[:-1]])]

    def smoothed(self) -> "Curve":
        """Return the mean over a fiftieth of the rows about each one, lost where it is."""
        values = pd.Series(self.values)
        means = values.rolling(max(1, len(values) // 50), center=True, min_periods=1).mean()
        return Curve(self.steps, means.where(values.notna()).to_numpy())

    def thinned(self, most: int = MOST_POINTS) -> "Curve":
        """Return a curve that looks the same: of each stretch the least, the greatest and the first lost value."""
        if len(self.steps) <= most:
            return self
        kept = {0, len(self.steps) - 1}
        for part in np.array_split(np.arange(len(self.steps)), most // 3):
            values = self.values[part]
            known = ~np.isnan(values)
            if known.any():
                kept |= {int(part[known][np.argmin(values[known])]), int(part[known][np.argmax(values[known])])}
            if not known.all():
                kept.add(int(part[~known][0]))
        places = np.array(sorted(kept))
        return Curve(self.steps[places], self.values[places])


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it is drawn.

    Attributes:
      name: tells it apart from the others.
      folder: its workdir.
      curves: by the keys of `QUANTITIES`, those that it has.
      last_step: of all rows.
      device: that its rows name, "" for none.
    """

    name: str
    folder: Path
    curves: Mapping[str, Curve]
    last_step: int
    device: str


def read_runs(workdirs: Iterable[str | os.PathLike]) -> list[Run]:
    """Return the runs of workdirs, a folder that is named twice once.

    A run may be going on: half a row at the end is passed over.

    Raises:
      UserError: a folder is no run or cannot be read, has no rows yet, or a line of it is no row.
    """
    folders = list({folder.resolve(): folder for folder in (local_path(x, "run") for x in workdirs)}.values())
    rows = [_rows(folder) for folder in folders]
    titles = run_names(folders, [_config(folder) for folder in folders])
    return [_run(*parts) for parts in zip(titles, folders, rows, strict=True)]


def run_names(folders: Sequence[Path], configs: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Return what tells runs apart: in few words what differs between their configs, or else their folders' names."""
    if len(folders) > 1 and all(configs):
        found = _differences([config for config in configs if config])
        if len(set(found)) == len(found) and all(0 < len(name) <= LONGEST_NAME for name in found):
            return found
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            break
    return found


def _differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the values that differ, "Mamba D 64, lr=0.01", of each config."""
    flat = [{key: json.dumps(value) for key, value in flatten_dict(dict(x), sep=".").items()} for x in configs]
    keys = [key for key in sorted(set().union(*flat)) if len({values.get(key) for values in flat}) > 1]
    others = [key for key in keys if key not in ("model.layers", "model.d_model")]
    models = [_model(config) for config in configs] if others != keys else [""] * len(configs)
    told = {key: _shortest(key, others) for key in others}
    return [
        ", ".join(filter(None, [model, *(f"{told[key]}={values[key].strip('"')}" for key in others if key in values)]))
        for model, values in zip(models, flat, strict=True)
    ]


def _model(config: Mapping[str, Any]) -> str:
    """Return a model's name and sizes, "" where this version does not know its layers."""
    try:
        layers = [(kind, dict(options)) for kind, options in config["model"]["layers"]]
        return f"{names.family(layers)} {names.label(layers, config['model']['d_model'])}"
    except (UserError, KeyError, TypeError, ValueError):
        return ""


def _shortest(key: str, keys: Iterable[str]) -> str:
    """Return the last words of a dotted key that no other key ends in."""
    words = key.split(".")
    tails = [".".join(words[-length:]) for length in range(1, len(words) + 1)]
    return next(tail for tail in tails if sum(f".{other}".endswith(f".{tail}") for other in keys) == 1)


def _run(name: str, folder: Path, rows: Sequence[Mapping[str, Any]]) -> Run:
    curves = {key: curve for key in QUANTITIES if len((curve := _curve(rows, key)).steps)}
    if not curves:
        raise UserError(f"Run '{folder}' has rows, but none with {', '.join(QUANTITIES)}.")
    device = next((str(row["device"]) for row in rows if row.get("device")), "")
    return Run(name, folder, curves, max(row["step"] for row in rows), device)


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Return a quantity by step; of several rows of a step the last one counts."""
    found = {row["step"]: _number(row[key]) for row in rows if key in row}
    steps = np.array(sorted(found), int)
    return Curve(steps, np.array([found[step] for step in steps.tolist()], float))


def _number(value: Any) -> float:
    """Return a number, NaN for what is none or infinite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a workdir's metrics."""
    path = folder / METRICS_FILE
    try:
        lines = read_file(path).split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{folder}' is no run: it has no {METRICS_FILE}.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {reason(error)}.") from None
    *whole, rest = lines
    rows = [_row(line, number, path) for number, line in enumerate(whole, start=1)]
    rows = [*rows, *_unfinished(rest)]
    if not rows:
        raise UserError(f"Run '{folder}' has no rows yet; its first one comes after `log_every` steps.")
    return rows


def _row(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row["step"], int):
            return row
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"Line {number} of '{path}' is no row of metrics: {line[:60]!r}.")


def _unfinished(line: bytes) -> list[dict[str, Any]]:
    """Return the row of a last line without an end, if it is whole."""
    try:
        return [_row(line, 0, Path())]
    except UserError:
        return []


def _config(folder: Path) -> dict[str, Any] | None:
    """Return the config of a workdir, None where there is none to read: the folder's name will do."""
    try:
        config = json.loads(read_file(folder / CONFIG_FILE).decode())
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None

"""The rows of the study: of each model the rate that its seeds do best with."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from based_jax.store import Store
from experiments.lm_recall import sweeps

FOLDER = Path(__file__).parent
README, PICTURE = FOLDER / "README.md", FOLDER / "results" / "recall"
RUNS, MQAR = FOLDER / "results" / "runs", FOLDER / "results" / "mqar"
TITLES = {
    "based": "Based",
    "attention": "Attention",
    "window": "Sliding window",
    "mamba2": "Mamba-2",
    "gated_deltanet": "Gated DeltaNet",
    "gla": "GLA",
    "deltanet": "DeltaNet",
    "gated_deltanet_window": "Gated DeltaNet + window",
    "mamba2_window": "Mamba-2 + window",
    "gsa": "GSA",
    "rwkv7": "RWKV-7",
    "mamba": "Mamba",
}
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with the rows of the rate that gives it the least loss, one a seed.

    Attributes:
      name: of `sweeps`.
      rows: finished ones, of that rate.
      rates: learning rates that were tried.
    """

    name: str
    rows: Sequence[Row]
    rates: int

    @property
    def title(self) -> str:
        """The model's name in tables."""
        return TITLES.get(self.name, self.name)

    def mean(self, *keys: str) -> float:
        """Return the mean over seeds of what stands under these keys."""
        return mean(_under(row, keys) for row in self.rows)

    def recall(self, task: str, length: int) -> tuple[float, float, float] | None:
        """Return the mean over seeds of a part with the ends of its interval; None where it was not asked."""
        parts = [x for row in self.rows for x in row["recall"] if (x["task"], x["length"]) == (task, length)]
        return tuple(mean(x[key] for x in parts) for key in ("value", "low", "high")) if parts else None


def read(names: Iterable[str] = tuple(sweeps.MODELS), path: Path = RUNS) -> list[Model]:
    """Return those of these models that have a finished run.

    Rates count that all of them have been tried with, so that none has a choice that another has not had yet.
    """
    rows = Store(path).rows()
    tried = {name: found for name in names if (found := _by_rate(name, rows))}
    fair = set[float].intersection(*map(set, tried.values())) if tried else set()
    models = (_model(name, {rate: found[rate] for rate in fair}) for name, found in tried.items())
    return [model for model in models if model is not None]


def _by_rate(name: str, rows: Sequence[Row]) -> dict[float, list[Row]]:
    """Return a model's rows by their rate."""
    found: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        if row["model"] == name:
            found[row["config"]["optim"]["lr"]].append(row)
    return found


def _model(name: str, tried: Mapping[float, Sequence[Row]]) -> Model | None:
    """Return a model with the best of these rates; None where it has diverged with all of them."""
    done = {rate: found for rate, found in tried.items() if all(row["status"] == "finished" for row in found)}
    if not done:
        return None
    best = min(done, key=lambda rate: mean(row["loss"] for row in done[rate]))
    return Model(name, done[best], len(tried))


def lengths(models: Sequence[Model], task: str) -> list[int]:
    """Return the lengths that a task was asked at."""
    return sorted({x["length"] for model in models for row in model.rows for x in row["recall"] if x["task"] == task})


def device_minutes(path: Path = RUNS) -> Iterator[tuple[str, int, float]]:
    """Yield each device's name, its runs and its minutes."""
    devices: dict[str, list[float]] = defaultdict(list)
    for row in Store(path).rows():
        devices[row["device"]].append(row["seconds"] / 60)
    return ((name, len(found), sum(found)) for name, found in sorted(devices.items()))


def _under(row: Row, keys: Sequence[str]) -> float:
    value: Any = row
    for key in keys:
        value = value[key]
    return float(value)

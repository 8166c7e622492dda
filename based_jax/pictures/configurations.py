"""From rows of a store to configurations: the best learning rate of each seed, then the median over seeds."""

import dataclasses
import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from based_jax.errors import UserError
from based_jax.nn import names
from based_jax.nn.accounting import COUNTED_ELEMENTS, ELEMENT_BYTES, state_bytes

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Configuration:
    """What the learning rates and seeds of one configuration came to: a point of a picture.

    Attributes:
      layers, d_model: its architecture.
      median, low, high: over seeds, of the accuracy at a seed's best learning rate; NaN where all runs diverged.
      chosen: for each seed the row of its best learning rate, the worst seed first; none of a seed that diverged at
        every rate.
      rows: all of them, by learning rate and seed.
    """

    layers: list[tuple[str, dict[str, Any]]]
    d_model: int
    median: float
    low: float
    high: float
    chosen: Sequence[Row]
    rows: Sequence[Row]

    @property
    def family(self) -> str:
        """The main mixers' name."""
        return names.family(self.layers)

    @property
    def label(self) -> str:
        """The configuration in a few letters."""
        return names.label(self.layers, self.d_model)

    @property
    def row(self) -> Row:
        """The row at the median, or right below; the first one where all diverged."""
        return self.chosen[(len(self.chosen) - 1) // 2] if self.chosen else self.rows[0]

    @property
    def diverged_runs(self) -> int:
        """How many of the runs diverged."""
        return sum(diverged(row) for row in self.rows)

    @property
    def diverged_seeds(self) -> int:
        """How many seeds diverged at every learning rate."""
        return len({_seed(row) for row in self.rows}) - len(self.chosen)

    def state_bytes(self, *, convolution: bool) -> int:
        """Return bytes of state after the longest test; see `nn.accounting`.

        Those of a model with a mixer from outside the package stand in its row.
        """
        if (counted := self.row.get("counted_elements")) is not None:
            [name] = (name for name, value in COUNTED_ELEMENTS.items() if value == convolution)
            return ELEMENT_BYTES * counted[name]
        return state_bytes(self.layers, self.d_model, longest_test(self.row), convolution=convolution)


def configurations(rows: Iterable[Row]) -> list[Configuration]:
    """Return the configurations: rows of one differ in no more than learning rate and seed.

    A run that diverged has no accuracy: it is counted, and never the best of its seed.

    Raises:
      UserError: a row lacks something that the reduction needs, or rows are of different tasks or tests.
    """
    rows = list(rows)
    columns = {"configuration": _shared, "learning_rate": learning_rate, "seed": _seed, "accuracy": accuracy}
    runs = pd.DataFrame({name: [value(row) for row in rows] for name, value in columns.items()} | {"row": rows})
    _check_comparable(rows)
    return [_reduced(group) for _, group in runs.groupby("configuration", sort=False)]


def by_feature_map(points: Iterable[Configuration]) -> dict[tuple[str, str], list[Configuration]]:
    """Return the points of each feature map and its dimensions, ("relu", "K = 16") or ("relu", "K = D"), by width.

    At each width it is the best one, one that diverged where there is no other; the points of models that are no linear
    attention are left out.
    """
    found = [(*feature_map, point) for point in points if (feature_map := names.feature_map(point.layers))]
    table = pd.DataFrame(
        [(name, dim if dim != point.d_model else 0, point.d_model, point.median, point) for name, dim, point in found],
        columns=["name", "dimensions", "width", "median", "point"],
    )
    best = table.sort_values("median", ascending=False, kind="stable").drop_duplicates(["name", "dimensions", "width"])
    best = best.sort_values(["name", "dimensions", "width"])
    lines = best.groupby(["name", "dimensions"])["point"]
    return {(name, f"K = {dimensions or 'D'}"): list(line) for (name, dimensions), line in lines}


NUMBER_OR_NONE, INTEGER_OR_NONE, TEXT_OR_NONE = (float, int, type(None)), (int, type(None)), (str, type(None))
KINDS_BY_KEY: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "segments": (dict,),
    "accuracy": NUMBER_OR_NONE,
    "seconds": NUMBER_OR_NONE,
    **dict.fromkeys(("params", "state_bytes", "steps"), INTEGER_OR_NONE),
    **dict.fromkeys(("status", "sweep"), TEXT_OR_NONE),
    "overrides": (dict,),
    "versions": (dict, type(None)),
    "counted_elements": (dict, type(None)),
}
"""Of what a row may have beside its config."""


def diverged(row: Row) -> bool:
    """Return whether a run ended in numbers that are none: its row says so, or has no accuracy."""
    value = row["accuracy"]
    said = row.get("diverged") or row.get("status") == "diverged"
    return bool(said) or value is None or not math.isfinite(value)


def accuracy(row: Row) -> float:
    """Return the accuracy of a row, NaN where the run diverged, whatever a broken model came to."""
    return math.nan if diverged(row) else float(row["accuracy"])


def learning_rate(row: Row) -> float:
    """Return the peak learning rate of a row."""
    return float(row["config"]["optim"]["lr"])


def longest_test(row: Row) -> int:
    """Return the tokens of the longest test segment, those of a row where the data has none."""
    data = row["config"].get("data", {})
    lengths = [int(segment["seq_len"]) for segment in data.get("test", [data] if "seq_len" in data else [])]
    if not (lengths := lengths or _lengths_in_names(row)):
        raise UserError(
            f"Row '{row['id']}' tells no length of a test segment; it is in config.data, as test or seq_len."
        )
    return max(lengths)


def _lengths_in_names(row: Row) -> list[int]:
    """Return the tokens that names such as "1024x256" start with."""
    starts = [name.partition("x")[0] for name in row["segments"]]
    return [int(start) for start in starts if start.isdecimal()]


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (bytes, accuracy) that no point with as few bytes or fewer beats, by bytes."""
    found: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or value > found[-1][1]:
            found.append((size, value))
    return found


def _seed(row: Row) -> int:
    return row["config"]["seed"]


def _shared(row: Row) -> str:
    """Return what rows of one configuration share."""
    name = row.get("id", "?")
    for key, kinds in KINDS_BY_KEY.items():
        if not isinstance(row.get(key, kinds[0]()), kinds):
            raise UserError(f"Row '{name}' is not of a sweep: its {key} is {row[key]!r:.40}.")
    try:
        if not all(isinstance(value, NUMBER_OR_NONE) for value in row["segments"].values()):
            raise TypeError
        if not math.isfinite(learning_rate(row)):
            raise ValueError
        config = json.loads(json.dumps(row["config"]))
        _ = row["accuracy"], row["segments"], operator.index(config["model"]["d_model"])
        _ = operator.index(_seed(row)), [(str(kind), dict(options)) for kind, options in config["model"]["layers"]]
        _ = dict(config.get("data", {})), longest_test(row)
        del config["optim"]["lr"], config["seed"]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"Row '{name}' is not of a sweep: it needs config, accuracy and segments.") from None
    return json.dumps(config, sort_keys=True)


def _check_comparable(rows: Sequence[Row]) -> None:
    """Check that all rows were tested on the same: accuracies of different tests, and bytes after different lengths,
    are no picture.

    What a row does not tell, an old one its task and one that diverged its segments, differs from nothing.
    """
    facts = {
        "are of different tasks": {task for row in rows if (task := row["config"].get("data", {}).get("kind"))},
        "were tested on different segments": {", ".join(sorted(row["segments"])) for row in rows if row["segments"]},
        "were tested on different lengths": {f"{longest_test(row):,} tokens" for row in rows},
    }
    for what, found in facts.items():
        if len(found) > 1:
            told = " and ".join(f"'{x}'" for x in sorted(found)[:2])
            raise UserError(f"The rows {what}, {told}; a picture is of one: name stores, or files of them, that agree.")


def _reduced(runs: pd.DataFrame) -> Configuration:
    """Return a configuration of its runs: for each seed the best learning rate, then the median over seeds."""
    runs = runs.sort_values(["learning_rate", "seed"])
    whole = runs.dropna(subset="accuracy")
    best = whole.loc[whole.groupby("seed", sort=False)["accuracy"].idxmax()].sort_values("accuracy", kind="stable")
    model = runs["row"].iloc[0]["config"]["model"]
    layers = [(kind, dict(options)) for kind, options in model["layers"]]
    low, median, high = best["accuracy"].agg(["min", "median", "max"])
    return Configuration(layers, model["d_model"], median, low, high, list(best["row"]), list(runs["row"]))

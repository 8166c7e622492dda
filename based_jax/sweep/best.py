"""From rows of a store to points of a picture: the best learning rate of each seed, then the median over seeds."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from based_jax.errors import UserError
from based_jax.sweep import families
from based_jax.sweep.accounting import state_bytes

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Best:
    """One configuration, with what its learning rates and seeds came to.

    Attributes:
      layers, d_model: its architecture.
      median, low, high: over seeds, of the accuracy at a seed's best learning rate.
      chosen: for each seed the row of its best learning rate, the worst seed first.
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
        return families.family(self.layers)

    @property
    def label(self) -> str:
        """The configuration in a few letters."""
        return families.label(self.layers, self.d_model)

    @property
    def row(self) -> Row:
        """The row at the median, or right below."""
        return self.chosen[(len(self.chosen) - 1) // 2]

    def state_bytes(self, *, convolution: bool) -> int:
        """Return bytes of state after the longest test; see `accounting`."""
        return state_bytes(self.layers, self.d_model, longest_test(self.row), convolution=convolution)


def best(rows: Iterable[Row]) -> list[Best]:
    """Return one point for each configuration, that is: for rows that differ in no more than learning rate and seed.

    A run that diverged counts with the accuracy that it has, 0 where that is no number.

    Raises:
      UserError: a row lacks something that the reduction needs.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_configuration(row), []).append(row)
    return [_reduced(group) for group in groups.values()]


def by_feature_map(points: Iterable[Best]) -> dict[tuple[str, str], list[Best]]:
    """Return the points of each feature map and its dimensions, ("relu", "K = 16") or ("relu", "K = D"), by width.

    At each width it is the best one; the points of models that are no linear attention are left out.
    """
    tops: dict[tuple[str, int, int], Best] = {}
    for point in points:
        if found := families.feature_map(point.layers):
            name, dimensions = found
            key = name, dimensions if dimensions != point.d_model else 0, point.d_model
            tops[key] = max(point, tops.get(key, point), key=lambda point: point.median)
    lines: dict[tuple[str, str], list[Best]] = {}
    for (name, dimensions, _), point in sorted(tops.items(), key=lambda item: item[0]):
        lines.setdefault((name, f"K = {dimensions or 'D'}"), []).append(point)
    return lines


def accuracy(row: Row) -> float:
    """Return the accuracy of a row, 0 where it is no number."""
    value = row["accuracy"]
    return float(value) if value is not None and math.isfinite(value) else 0.0


def learning_rate(row: Row) -> float:
    """Return the peak learning rate of a row."""
    return float(row["config"]["optim"]["lr"])


def longest_test(row: Row) -> int:
    """Return the tokens of the longest test segment."""
    tests = row["config"].get("data", {}).get("test", [])
    lengths = [int(segment["seq_len"]) for segment in tests] or _lengths_in_names(row)
    if not lengths:
        raise UserError(f"Row '{row['id']}' tells no length of a test segment; it is in config.data.test.")
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


def _configuration(row: Row) -> str:
    """Return what rows of one configuration share."""
    try:
        config = json.loads(json.dumps(row["config"]))
        del config["optim"]["lr"], config["seed"]
        _ = row["accuracy"], row["segments"], config["model"]["layers"], config["model"]["d_model"]
    except (KeyError, TypeError):
        name = row.get("id", "?")
        raise UserError(f"Row '{name}' is not of a sweep: it needs config, accuracy and segments.") from None
    return json.dumps(config, sort_keys=True)


def _reduced(rows: Sequence[Row]) -> Best:
    ordered = sorted(rows, key=lambda row: (learning_rate(row), row["config"]["seed"]))
    seeds = dict.fromkeys(row["config"]["seed"] for row in ordered)
    chosen = [max((x for x in ordered if x["config"]["seed"] == seed), key=accuracy) for seed in seeds]
    chosen.sort(key=accuracy)
    values = [accuracy(row) for row in chosen]
    model = rows[0]["config"]["model"]
    layers = [(kind, dict(options)) for kind, options in model["layers"]]
    return Best(layers, model["d_model"], statistics.median(values), values[0], values[-1], chosen, ordered)

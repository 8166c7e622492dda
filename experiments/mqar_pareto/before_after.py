"""The models before zoology's own beside those: what each configuration recalls, and what its runs cost."""

import re
from collections.abc import Sequence

import pandas as pd

from based_jax.pictures.configurations import Configuration
from based_jax.pictures.tables import markdown
from experiments.mqar_pareto.sweeps import BASE


def before_and_after(before: Sequence[Configuration], after: Sequence[Configuration]) -> str:
    """Return a table of the first seed's accuracy, and of the GPU seconds of its runs, a line for each configuration.

    Both are of the first seed alone, which all configurations have; accuracies are at its best learning rate.
    """
    older = {(point.family, point.label): point for point in before}
    pairs = [(point, older.get((point.family, earlier_label(point.label)))) for point in after]
    lines = [[f"{point.family}, {point.label}", *_told(old, point)] for point, old in pairs]
    seconds = [[_seconds(point) for point in pair] for pair in zip(*pairs, strict=True)]
    total = [f"{sum(filter(None, column)):,.0f}" for column in reversed(seconds)]
    columns = ["mixer", "accuracy before", "now", "seconds of a GPU before", "now "]
    return markdown(pd.DataFrame([*lines, ["all of them", "", "", *total]], columns=columns))


def earlier_label(label: str) -> str:
    """Return the label that a configuration had: a window's tokens were counted with the query's own."""
    return re.sub(r"\bw (\d+)", lambda found: f"w {int(found[1]) - 1}", label)


def _told(*points: Configuration | None) -> list[str]:
    accuracies, seconds = map(_accuracy, points), map(_seconds, points)
    return ["-" if value is None else f"{value:.3f}" for value in accuracies] + [
        "-" if value is None else f"{value:,.0f}" for value in seconds
    ]


def _accuracy(point: Configuration | None) -> float | None:
    if point is None:
        return None
    return next((row["accuracy"] for row in point.chosen if row["config"]["seed"] == BASE["seed"]), None)


def _seconds(point: Configuration | None) -> float | None:
    if point is None:
        return None
    return sum(row["seconds"] for row in point.rows if row["config"]["seed"] == BASE["seed"])

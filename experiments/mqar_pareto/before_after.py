"""Zoology's own models beside those before them: what each configuration recalls, and what its runs cost."""

import re
from collections.abc import Iterable, Sequence

import pandas as pd

from based_jax.pictures.configurations import Configuration, Row, accuracy, learning_rate
from based_jax.pictures.tables import markdown
from experiments.mqar_pareto.sweeps import BASE, RATES


def before_and_after(before: Sequence[Configuration], after: Sequence[Configuration]) -> str:
    """Return a table of the accuracy and of the GPU seconds of the first seed, a line for each configuration.

    Seeds after the first are left out, which only some configurations have, and so are configurations that have not
    been run at every learning rate. Accuracies are at the best one.
    """
    older = {(point.family, point.label): point for point in before}
    pairs = [
        (older[key], point)
        for point in after
        if (key := (point.family, earlier_label(point.label))) in older and _is_whole(older[key]) and _is_whole(point)
    ]
    lines = [
        [
            f"{new.family}, {new.label}",
            *map(_accuracy, (old, new)),
            *(f"{_seconds(point):,.0f}" for point in (old, new)),
        ]
        for old, new in sorted(pairs, key=lambda pair: (pair[1].family, pair[1].state_bytes(convolution=False)))
    ]
    totals = [f"{sum(map(_seconds, points)):,.0f}" for points in zip(*pairs, strict=True)]
    columns = ["mixer", "accuracy before", "zoology's", "GPU seconds before", "and now"]
    return markdown(pd.DataFrame([*lines, ["all of them", "", "", *totals]], columns=columns))


def earlier_label(label: str) -> str:
    """Return the label that a configuration had: a window's tokens were counted with the query's own."""
    return re.sub(r"\bw (\d+)", lambda found: f"w {int(found[1]) - 1}", label)


def _is_whole(point: Configuration) -> bool:
    return {learning_rate(row) for row in _first_seed(point.rows)} >= set(RATES)


def _accuracy(point: Configuration) -> str:
    [best] = _first_seed(point.chosen) or [None]
    return "diverged" if best is None else f"{accuracy(best):.3f}"


def _seconds(point: Configuration) -> float:
    return sum(row["seconds"] for row in _first_seed(point.rows))


def _first_seed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["config"]["seed"] == BASE["seed"]]

"""A sweep as one web page: the frontier to explore, with everything in the file and nothing fetched."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from based_jax.errors import UserError
from based_jax.nn import names
from based_jax.pictures import references, styles, web
from based_jax.pictures.configurations import (
    Configuration,
    Row,
    accuracy,
    configurations,
    learning_rate,
    longest_test,
)
from based_jax.pictures.references import ReferencePoint, ReferenceSource

TITLE = "Recall against bytes of state"
TOLD_OVERRIDES = ("seed", "optim.lr", "model.d_model", "model.layers")
"""Overrides that a point's other values tell."""


def write(
    rows: Iterable[Row], path: str | os.PathLike, *, title: str, published: Sequence[ReferencePoint] = ()
) -> Path:
    """Write the page and return its path.

    Args:
      rows: of a store; reduced to `configurations`.
      path: of the HTML file.
      title: its heading.
      published: points of other sources, shown hollow.

    Raises:
      UserError: there are no rows, one is not of a sweep, they are of different tasks or tests, or the file cannot be
        written.
    """
    points = configurations(rows)
    if not points:
        raise UserError("There are no rows to show; run the sweep first.")
    found = data(points, published)
    return web.write(path, "page.html", title=title, data=found, styles=["page.css"], script="page.js")


def data(points: Sequence[Configuration], published: Sequence[ReferencePoint] = ()) -> dict[str, Any]:
    """Return what the page shows; bytes come in pairs, without and with convolution layers."""
    style_of = styles.styles([*(x.family for x in points), *(x.family for x in published)])
    markers = references.source_markers(published)
    return {
        "families": [{"name": name, **vars(style)} for name, style in style_of.items()],
        "points": [_point(point) for point in points],
        "published": [_published(point, markers) for point in published],
        "sources": [{"name": source.name, "marker": marker} for source, marker in markers.items()],
        "tokens": sorted({longest_test(point.row) for point in points}),
        "made": _made([row for point in points for row in point.rows]),
    }


def _point(point: Configuration) -> dict[str, Any]:
    row = point.row
    return {
        "family": point.family,
        "label": point.label,
        "bytes": [point.state_bytes(convolution=counted) for counted in (False, True)],
        "accuracy": _number(point.median),
        "low": _number(point.low),
        "high": _number(point.high),
        "seeds": len(point.chosen),
        "lost": point.diverged_runs,
        "lostSeeds": point.diverged_seeds,
        "lr": learning_rate(row),
        "id": row["id"],
        "layers": names.architecture(point.layers),
        "settings": [f"{key}={value}" for key, value in row.get("overrides", {}).items() if key not in TOLD_OVERRIDES],
        "segments": {name: _number(value) for name, value in row["segments"].items()},
        "runs": [
            [learning_rate(x), _number(accuracy(x)), x["config"]["seed"], str(x.get("status", ""))] for x in point.rows
        ],
        **{name: row.get(name) for name in ("params", "state_bytes", "steps", "status", "sweep")},
        "seconds": _number(sum(float(x.get("seconds") or 0) for x in point.rows)),
    }


def _run(row: Row) -> tuple[float, float | None, int, str]:
    return learning_rate(row), _number(accuracy(row)), row["config"]["seed"], str(row.get("status", ""))


def _published(point: ReferencePoint, markers: Mapping[ReferenceSource, str]) -> dict[str, Any]:
    sizes = [point.state_bytes(convolution=counted) for counted in (False, True)]
    return {
        "family": point.family,
        "label": point.label,
        "bytes": sizes,
        "accuracy": point.accuracy,
        "source": point.source.citation,
        "marker": markers[point.source],
    }


def _number(value: Any) -> float | None:
    """Return a number that JSON has, or None."""
    return float(value) if value is not None and math.isfinite(value) else None


def _made(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what made the rows: runs, and the distinct devices, versions, revisions and commands."""
    versions = {f"{name} {version}": 0 for row in rows for name, version in (row.get("versions") or {}).items()}
    distinct = {
        name: list(dict.fromkeys(str(row[name]) for row in rows if row.get(name)))
        for name in ("device", "revision", "command")
    }
    return {"runs": len(rows), "versions": list(versions), **distinct}

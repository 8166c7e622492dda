"""A sweep as one web page: the frontier to explore, with everything in the file and nothing fetched."""

import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from based_jax.errors import UserError
from based_jax.nn import names
from based_jax.pictures import references, styles
from based_jax.pictures.configurations import (
    Configuration,
    Row,
    accuracy,
    configurations,
    learning_rate,
    longest_test,
)
from based_jax.pictures.references import ReferencePoint, ReferenceSource

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("figures.js", "page.js")
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
      UserError: there are no rows, or one is not of a sweep.
    """
    points = configurations(rows)
    if not points:
        raise UserError("There are no rows to show; run the sweep first.")
    parts = {
        "title": html.escape(title),
        "style": (ASSETS / "page.css").read_text(),
        "script": "\n".join((ASSETS / name).read_text() for name in SCRIPTS),
        "data": embedded(data(points, published)),
    }
    # In one pass: braces in a title or in the data are text.
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (ASSETS / "page.html").read_text())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return Path(path)


def embedded(value: Any) -> str:
    """Return JSON that can stand inside a script element: no string of it can close the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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
        "accuracy": point.median,
        "low": point.low,
        "high": point.high,
        "seeds": len(point.chosen),
        "lr": learning_rate(row),
        "id": row["id"],
        "layers": names.architecture(point.layers),
        "settings": [f"{key}={value}" for key, value in row.get("overrides", {}).items() if key not in TOLD_OVERRIDES],
        "segments": {name: _number(value) for name, value in row["segments"].items()},
        "runs": [[learning_rate(x), accuracy(x), x["config"]["seed"], str(x.get("status", ""))] for x in point.rows],
        **{name: row.get(name) for name in ("params", "state_bytes", "steps", "status", "sweep")},
        "seconds": _number(sum(float(x.get("seconds") or 0) for x in point.rows)),
    }


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

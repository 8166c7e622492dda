"""A sweep as one web page: the frontier to explore, with everything in the file and nothing fetched."""

import html
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from based_jax.errors import UserError
from based_jax.sweep import families, published
from based_jax.sweep.best import Best, Row, accuracy, best, learning_rate, longest_test

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("figures.js", "page.js")
TOLD = ("seed", "optim.lr", "model.d_model", "model.layers")
"""Overrides that a point's other values tell."""


def write(rows: Iterable[Row], path: str | os.PathLike, *, title: str) -> Path:
    """Write the page and return its path.

    Args:
      rows: of a store; reduced by `best`.
      path: of the HTML file.
      title: its heading.

    Raises:
      UserError: there are no rows, or one is not of a sweep.
    """
    points = best(rows)
    if not points:
        raise UserError("There are no rows to show; run the sweep first.")
    parts = {
        "title": html.escape(title),
        "style": (ASSETS / "page.css").read_text(),
        "script": "\n".join((ASSETS / name).read_text() for name in SCRIPTS),
        "data": embedded(data(points)),
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


def data(points: Sequence[Best]) -> dict[str, Any]:
    """Return what the page shows; bytes come in pairs, without and with convolution layers."""
    theirs = published.comparable(x.row for x in points)
    styles = families.styles([*(x.family for x in points), *(x.family for x in theirs)])
    return {
        "families": [{"name": name, **vars(style)} for name, style in styles.items()],
        "points": [_point(point) for point in points],
        "published": [_published(point) for point in theirs],
        "tokens": sorted({longest_test(point.row) for point in points}),
        "made": _made([row for point in points for row in point.rows]),
    }


def _point(point: Best) -> dict[str, Any]:
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
        "layers": families.architecture(point.layers),
        "settings": [f"{key}={value}" for key, value in row.get("overrides", {}).items() if key not in TOLD],
        "segments": {name: _number(value) for name, value in row["segments"].items()},
        "runs": [[learning_rate(x), accuracy(x), x["config"]["seed"], str(x.get("status", ""))] for x in point.rows],
        **{name: row.get(name) for name in ("params", "state_bytes", "steps", "status", "sweep")},
        "seconds": _number(sum(float(x.get("seconds") or 0) for x in point.rows)),
    }


def _published(point: published.Published) -> dict[str, Any]:
    sizes = [point.state_bytes(convolution=counted) for counted in (False, True)]
    return {
        "family": point.family,
        "label": point.label,
        "bytes": sizes,
        "accuracy": point.accuracy,
        "source": point.source,
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

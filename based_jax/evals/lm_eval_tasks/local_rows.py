"""Rows of the package's own samples, or of a file, for tasks of lm-eval."""

from typing import Any

from based_jax.evals.choices import TASKS
from based_jax.evals.sets import read_rows


def lambada(**metadata: Any) -> dict[str, Any]:
    """Return LAMBADA's rows, of the file that `--metadata='{"lambada": FILE}'` names."""
    return _split("lambada", metadata)


def arc_easy(**metadata: Any) -> dict[str, Any]:
    """Return ARC-Easy's rows, likewise."""
    return _split("arc_easy", metadata)


def _split(name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    import datasets  # comes with lm-eval

    return {"test": datasets.Dataset.from_list(read_rows(metadata.get(name) or TASKS[name].source))}

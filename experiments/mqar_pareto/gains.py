"""What each change to a plain loop brings, from the rows of `throughput`: two tables in markdown."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from based_jax.errors import UserError
from experiments.mqar_pareto.throughput import RESULTS

WAYS = {
    "loop": "plain loop",
    "answers": "logits at the answers",
    "fused": "and loss fused",
    "resident": "on the device",
}
Way = tuple[str, int]
"""A way of running, and its lanes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--rows", type=Path, default=RESULTS / "throughput.jsonl", help="of throughput")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    rows = [json.loads(text) for text in args.rows.read_text().splitlines()]
    print(render(rows))
    return 0


def render(rows: Iterable[dict]) -> str:
    """Return the tables: seconds of a trial's epoch by each way, and trials an hour more by lanes on each segment.

    Raises:
      UserError: a segment was measured in ways in which another one of its model was not.
    """
    models: dict[str, dict[Way, dict[str, float]]] = {}
    steps: dict[str, int] = {}
    for row in rows:
        if "error" not in row:
            way = models.setdefault(row["model"], {}).setdefault((row["way"], row["lanes"]), {})
            way[row["segment"]] = row["milliseconds"] / row["lanes"]
            steps[row["segment"]] = row["steps_per_epoch"]
    for model, ways in models.items():
        if missing := {way for way, found in ways.items() if found.keys() != steps.keys()}:
            raise UserError(f"{model} has not been measured on every segment: {sorted(missing)[0]}.")
    return f"{_epochs(models, steps)}\n\n{_lanes(models, steps)}"


def _epochs(models: dict, steps: dict[str, int]) -> str:
    ways = list(dict.fromkeys(way for found in models.values() for way in found))
    lines = [["model", *(WAYS.get(way, f"{lanes} lanes") for way, lanes in ways), "loop / best"]]
    totals = dict.fromkeys(ways, 0.0)
    for model, found in models.items():
        seconds = {way: sum(found[way][x] * steps[x] for x in steps) / 1e3 for way in ways}
        totals = {way: totals[way] + seconds[way] for way in ways}
        lines.append([model, *_seconds(seconds)])
    return _table([*lines, ["all of them", *_seconds(totals)]])


def _seconds(found: dict[Way, float]) -> list[str]:
    return [*(f"{x:.2f}" for x in found.values()), f"{found['loop', 1] / min(found.values()):.1f}"]


def _lanes(models: dict, steps: dict[str, int]) -> str:
    lines = [["model", *steps]]
    for model, found in models.items():
        best = {x: min(times[x] for (way, _), times in found.items() if way == "lanes") for x in steps}
        lines.append([model, *(f"{found['resident', 1][x] / best[x] - 1:.0%}" for x in steps)])
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])

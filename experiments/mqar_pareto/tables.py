"""The README's last tables in markdown.

From the rows of `throughput` what each change to a plain loop brings, and from those of `profile` where a step's time
goes.
"""

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
OPERATIONS = "recurrence", "selective_scan", "taylor", "window"
"""What the names of a mixer's own kernels begin with; those that are not among a row's longest are not counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of throughput.jsonl and profile.jsonl")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    throughput, profile = (
        [json.loads(text) for text in (args.results / f"{name}.jsonl").read_text().splitlines()]
        for name in ("throughput", "profile")
    )
    print("\n\n".join([*gains(throughput), kernels(profile)]))
    return 0


def kernels(rows: Iterable[dict]) -> str:
    """Return a table of the milliseconds in which kernels run, a step of each model, and those of its operation."""
    last = {row["model"]: row for row in rows if "kernel_milliseconds" in row}
    widths = sorted({int(model.rpartition("_")[2]) for model in last} - {64})
    lines = [["model", *(text for width in widths for text in (f"D={width}", "its operation"))]]
    for name in sorted({model.rpartition("_")[0] for model in last}):
        found = [last.get(f"{name}_{width}") for width in widths]
        if all(found):
            lines.append([name, *(text for row in found for text in _kernels(row))])
    return _table(lines)


def _kernels(row: dict) -> list[str]:
    own = sum(spent for kernel, spent, _ in row["top"] if kernel.startswith(OPERATIONS))
    return [f"{row['kernel_milliseconds']:.2f}", f"{own:.2f}" if own else "-"]


def gains(rows: Iterable[dict]) -> tuple[str, str]:
    """Return tables of seconds of a trial's epoch by each way, and of trials an hour more by lanes on each segment.

    Raises:
      UserError: a segment was measured in ways in which another one of its model was not.
    """
    models: dict[str, dict[Way, dict[str, float]]] = {}
    counts: dict[str, int] = {}
    for row in rows:
        if "error" not in row:
            way = models.setdefault(row["model"], {}).setdefault((row["way"], row["lanes"]), {})
            way[row["segment"]] = row["milliseconds"] / row["lanes"]
            counts[row["segment"]] = row["steps_per_epoch"]
    for model, ways in models.items():
        if missing := {way for way, found in ways.items() if found.keys() != counts.keys()}:
            raise UserError(f"{model} has not been measured on every segment: {sorted(missing)[0]}.")
    return _epochs(models, counts), _lanes(models, counts)


def _epochs(models: dict, counts: dict[str, int]) -> str:
    ways = list(dict.fromkeys(way for found in models.values() for way in found))
    lines = [["model", *(WAYS.get(way, f"{lanes} lanes") for way, lanes in ways), "loop / best"]]
    totals = dict.fromkeys(ways, 0.0)
    for model, found in models.items():
        seconds = {way: sum(found[way][x] * counts[x] for x in counts) / 1e3 for way in ways}
        totals = {way: totals[way] + seconds[way] for way in ways}
        lines.append([model, *_seconds(seconds)])
    return _table([*lines, ["all of them", *_seconds(totals)]])


def _seconds(found: dict[Way, float]) -> list[str]:
    return [*(f"{x:.2f}" for x in found.values()), f"{found['loop', 1] / min(found.values()):.1f}"]


def _lanes(models: dict, counts: dict[str, int]) -> str:
    lines = [["model", *counts]]
    for model, found in models.items():
        best = {x: min(times[x] for (way, _), times in found.items() if way == "lanes") for x in counts}
        lines.append([model, *(f"{found['resident', 1][x] / best[x] - 1:.0%}" for x in counts)])
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])

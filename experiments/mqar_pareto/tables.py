"""The README's tables in markdown, from the rows in results/.

From those of the sweeps what each mixer recalls within a budget of bytes, the agreement with what is published, the
time, what feature maps recall, and how far the same run comes to the same; from those of `throughput` what each change
to a plain loop brings; from those of `profile` where a step's time goes.
"""

import argparse
import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from based_jax.errors import UserError
from based_jax.store import Store
from based_jax.sweep import families
from based_jax.sweep.best import Best, accuracy, best, by_feature_map, learning_rate
from experiments.mqar_pareto.sweeps import BASE
from experiments.mqar_pareto.throughput import RESULTS

WAYS = {
    "loop": "plain loop",
    "answers": "logits at the answers",
    "fused": "and loss fused",
    "resident": "on the device",
}
ASKED = {
    ("Based", "D 64, K 16"): (0.88, 1),
    ("Based", "D 128, K 16"): (0.97, 1),
    ("Based", "D 256, K 16"): (0.98, 1),
    ("Sliding window", "D 128, w 64"): (0.45, 0.58),
    ("Sliding window", "D 128, w 1024"): (0.995, 1),
    ("Attention", "D 64"): (0.995, 1),
    ("Attention", "D 128"): (0.995, 1),
    ("Mamba", "D 256, N 16"): (0.72, 0.83),
    ("H3", "D 64, N 16, head 2"): (0, 0.4),
    ("H3", "D 128, N 32, head 2"): (0, 0.4),
    ("H3", "D 256, N 64, head 2"): (0, 0.4),
    ("DeltaNet", "D 128, 2 heads"): (0.95, 1),
    ("Gated DeltaNet", "D 128, 2 heads"): (0.97, 1),
}
"""By family and label: the accuracies, at the best of four learning rates, that agree with what is published."""
STORES = "figure2", "figure3", "ablation"
BUDGETS = 8, 16, 32, 64, 128, 256, 512, 1024
"""KiB of state."""
Way = tuple[str, int]
"""A way of running, and its lanes."""
OPERATIONS = "channel_decays", "one_decay", "recurrence", "selective_scan", "taylor", "window"
"""What the names of a mixer's own kernels begin with; those that are not among a row's longest are not counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the stores, throughput.jsonl and profile.jsonl"
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    throughput, profile = (
        [json.loads(text) for text in (args.results / f"{name}.jsonl").read_text().splitlines()]
        for name in ("throughput", "profile")
    )
    folder = args.results / "figure2"
    points = sorted(best(Store(folder).rows()), key=_bytes)
    recall = [budgets(points), agreement(points), seconds(folder)] if points else []
    if disputed := list(Store(args.results / "disputed").rows()):
        recall.append(tried(Store(folder).rows(), disputed))
    if maps := by_feature_map(best(Store(args.results / "figure3").rows())):
        recall.append(feature_maps(maps))
    stores = {name: {row["id"]: row for row in Store(args.results / name).rows()} for name in STORES}
    if shared := set.intersection(*map(set, stores.values())):
        recall.append(again(stores, shared))
    print("\n\n".join([*recall, *gains(throughput), kernels(profile)]))
    return 0


def agreement(points: Sequence[Best]) -> str:
    """Return a table of the points that something is asked of; an accuracy outside of it is bold.

    Raises:
      UserError: a point is not there.
    """
    found = {(point.family, point.label): point for point in points}
    lines = [["mixer", "state, KiB", "accuracy of each seed, at its best rate", "asked"]]
    for (family, label), (low, high) in ASKED.items():
        if (family, label) not in found:
            raise UserError(f"There are no rows of {family} with {label}; run the sweep first.")
        point = found[family, label]
        values = ", ".join(_judged(accuracy(row), low, high) for row in point.chosen)
        lines.append([f"{family}, {label}", f"{_bytes(point) / 1024:.0f}", values, f"{low:g} to {high:g}"])
    return _table(lines)


def _judged(value: float, low: float, high: float) -> str:
    return f"{value:.3f}" if low <= value <= high else f"**{value:.3f}**"


def tried(rows: Iterable[dict], disputed: Sequence[dict]) -> str:
    """Return a table of the accuracies of disputed models, a line for each way to run them, a column for each seed."""
    models = {_model(row) for row in disputed}
    found: dict[tuple, dict[int, float]] = {}
    for row in [*rows, *disputed]:
        if _model(row) in models:
            config = row["config"]
            order = "in another order" if config["data"]["shuffle"] else "in the reference's"
            way = _model(row), order, config["model"]["layers"][-1][1]["impl"], learning_rate(row)
            found.setdefault(way, {})[config["seed"]] = accuracy(row)
    seeds = sorted({seed for values in found.values() for seed in values})
    lines = [["model", "batches", "implementation", "learning rate", *(f"seed {seed}" for seed in seeds)]]
    for way, values in sorted(found.items()):
        lines.append([*way[:-1], f"{way[-1]:g}", *(f"{values[x]:.3f}" if x in values else "-" for x in seeds)])
    return _table(lines)


def _model(row: dict) -> str:
    """Return a row's "Gated DeltaNet, D 128, 2 heads"."""
    model = row["config"]["model"]
    return f"{families.family(model['layers'])}, {families.label(model['layers'], model['d_model'])}"


def budgets(points: Sequence[Best]) -> str:
    """Return a table of the best accuracy of each family with a state of at most so many KiB."""
    lines = [["mixer", *(f"{size:,} KiB" for size in BUDGETS)]]
    families = {point.family: [x for x in points if x.family == point.family] for point in points}
    for name, mine in sorted(families.items(), key=lambda item: -max(x.median for x in item[1])):
        within = ([x.median for x in mine if _bytes(x) <= 1024 * size] for size in BUDGETS)
        lines.append([name, *(f"{max(values):.3f}" if values else "-" for values in within)])
    return _table(lines)


def feature_maps(lines: Mapping[tuple[str, str], Sequence[Best]]) -> str:
    """Return a table of the accuracy and the KiB of state of feature maps at each width at which there are several."""
    counts = collections.Counter(point.d_model for line in lines.values() for point in line)
    widths = sorted(width for width, count in counts.items() if count > 1)
    table = [["feature map", *(f"D={width}" for width in widths)]]
    for name, line in lines.items():
        at = {point.d_model: f"{point.median:.3f} ({_bytes(point) / 1024:,.0f})" for point in line}
        table.append([", ".join(name), *(at.get(width, "-") for width in widths)])
    return _table(table)


def again(stores: Mapping[str, Mapping[str, dict]], shared: Iterable[str]) -> str:
    """Return a table of the accuracies of the runs that every store has, the same but for device and revision."""
    table = [["model", "learning rate", *stores]]
    rows = [[found[run] for found in stores.values()] for run in shared]
    for first, *others in sorted(rows, key=lambda same: learning_rate(same[0])):
        values = [f"{accuracy(row):.3f}" for row in (first, *others)]
        table.append([_model(first), f"{learning_rate(first):g}", *values])
    return _table(table)


def seconds(folder: Path) -> str:
    """Return a table of the seconds of a GPU that the grid's runs took, without second seeds, a line for each file."""
    lines, runs, total = [["rows", "device", "runs", "seconds", "longest run"]], 0, 0.0
    for file in sorted(folder.glob("*.jsonl")):
        rows = [row for row in Store(file).rows() if row["config"]["seed"] == BASE["seed"]]
        spent = [row["seconds"] for row in rows]
        devices = ", ".join(sorted({row["device"] for row in rows}))
        lines.append([file.name, devices, str(len(rows)), f"{sum(spent):,.0f}", f"{max(spent, default=0):.0f}"])
        runs, total = runs + len(rows), total + sum(spent)
    return _table([*lines, ["all of them", "", str(runs), f"{total:,.0f}", ""]])


def _bytes(point: Best) -> int:
    return point.state_bytes(convolution=False)


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

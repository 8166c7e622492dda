"""The README's tables in markdown, from the rows in results/.

From those of the sweeps what each mixer recalls within a budget of bytes, the agreement with what is published, the
time, zoology's own models beside earlier ones, what feature maps recall, and how far the same run comes to the same;
from those of `throughput` what each change
to a plain loop brings; from those of `profile` where a step's time goes.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from based_jax.bench.catalogue import OPERATIONS
from based_jax.errors import UserError
from based_jax.nn import names
from based_jax.pictures.configurations import Configuration, accuracy, by_feature_map, configurations, learning_rate
from based_jax.pictures.tables import markdown
from experiments.mqar_pareto import rows as sweep_rows
from experiments.mqar_pareto.before_after import before_and_after, earlier_label
from experiments.mqar_pareto.rows import of_recipe
from experiments.mqar_pareto.sweeps import BASE

WAY_NAMES = {
    "loop": "plain loop",
    "answers": "logits at the answers",
    "fused": "and loss fused",
    "resident": "on the device",
}
ASKED_ACCURACIES = {
    ("Based", "D 64, K 16"): (0.88, 1),
    ("Based", "D 128, K 16"): (0.97, 1),
    ("Based", "D 256, K 16"): (0.98, 1),
    ("Sliding window", "D 128, w 65"): (0.45, 0.58),
    ("Sliding window", "D 128, w 1025"): (0.995, 1),
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
BUDGETS_KIB = 8, 16, 32, 64, 128, 256, 512, 1024
"""Of state."""
SHARED_OPERATIONS = {
    "gated_short_conv",
    "short_conv",
    "residual_rms_norm",
    "residual_layer_norm",
    "rms_norm",
    "layer_norm",
    "linear_cross_entropy",
}
"""Models have them about any mixer, or, short convolutions, within it: none is what a mixer is named for."""
OPERATION_KERNELS = tuple(
    prefix
    for name, operation in OPERATIONS.items()
    if name not in SHARED_OPERATIONS
    for prefixes in operation.kernels.values()
    for prefix in prefixes
)
"""What the names of a mixer's own kernels begin with; those that are not among a row's longest are not counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    sweep_rows.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    throughput, profile = (_lines(args.results / f"{name}.jsonl") for name in ("throughput", "profile"))
    folder = args.results / "figure2"
    found = {name: of_recipe(args.results / name, args.init_recipe) for name in (*STORES, "disputed")}
    points = sorted(configurations(found["figure2"]), key=_bytes)
    recall = [budgets(points), agreement(points), seconds(folder, args.init_recipe)] if points else []
    by_recipe = {name: configurations(of_recipe(folder, name)) for name in ("reference", "zoology")}
    if all(by_recipe.values()):
        recall.append(before_and_after(by_recipe["reference"], by_recipe["zoology"]))
    if found["disputed"]:
        recall.append(tried(found["figure2"], found["disputed"]))
    if maps := by_feature_map(configurations(found["figure3"])):
        recall.append(feature_maps(maps))
    stores = {name: {row["id"]: row for row in found[name]} for name in STORES}
    if shared := set.intersection(*map(set, stores.values())):
        recall.append(again(stores, shared))
    print("\n\n".join([*recall, *gains(throughput), kernels(profile)]))
    return 0


def _lines(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines."""
    try:
        return [json.loads(text) for text in path.read_text().splitlines()]
    except FileNotFoundError:
        raise UserError(f"There is no '{path}'; the command '{path.stem}' writes it.") from None


def agreement(points: Sequence[Configuration]) -> str:
    """Return a table of the points that something is asked of; an accuracy outside of it is bold.

    Raises:
      UserError: a point is not there.
    """
    found = {(point.family, point.label): point for point in points}
    lines = []
    for (family, label), (low, high) in ASKED_ACCURACIES.items():
        point = found.get((family, label)) or found.get((family, earlier_label(label)))
        if point is None:
            raise UserError(f"There are no rows of {family} with {label}; run the sweep first.")
        values = ", ".join(
            [_judged(accuracy(row), low, high) for row in point.chosen] + ["diverged"] * point.diverged_seeds
        )
        lines.append([f"{family}, {point.label}", f"{_bytes(point) / 1024:.0f}", values, f"{low:g} to {high:g}"])
    columns = ["mixer", "state, KiB", "accuracy of each seed, at its best rate", "asked"]
    return markdown(pd.DataFrame(lines, columns=columns))


def _judged(value: float, low: float, high: float) -> str:
    return f"{value:.3f}" if low <= value <= high else f"**{value:.3f}**"


def tried(rows: Iterable[dict], disputed: Sequence[dict]) -> str:
    """Return a table of the accuracies of disputed models, a line for each way to run them, a column for each seed."""
    models = {_model(row) for row in disputed}
    runs = pd.DataFrame([_trial(row) for row in [*rows, *disputed] if _model(row) in models])
    ways = ["model", "batches", "implementation", "learning rate"]
    runs["accuracy"] = runs["accuracy"].map(_told)
    table = runs.pivot_table(index=ways, columns="seed", values="accuracy", aggfunc="last")
    table = table.rename(columns="seed {}".format).reset_index()
    return markdown(table.assign(**{"learning rate": table["learning rate"].map("{:g}".format)}))


def _trial(row: dict) -> dict:
    """Return what `tried` tells of a run."""
    config = row["config"]
    return {
        "model": _model(row),
        "batches": "in another order" if config["data"]["shuffle"] else "in the reference's",
        "implementation": config["model"]["layers"][-1][1]["impl"],
        "learning rate": learning_rate(row),
        "seed": config["seed"],
        "accuracy": accuracy(row),
    }


def _model(row: dict) -> str:
    """Return a row's "Gated DeltaNet, D 128, 2 heads"."""
    model = row["config"]["model"]
    return f"{names.family(model['layers'])}, {names.label(model['layers'], model['d_model'])}"


def _told(value: float) -> str:
    """Return an accuracy, or that there is none."""
    return "diverged" if math.isnan(value) else f"{value:.3f}"


def budgets(points: Sequence[Configuration]) -> str:
    """Return a table of the best accuracy of each family with a state of at most so many KiB."""
    found = pd.DataFrame([{"mixer": x.family, "bytes": _bytes(x), "accuracy": x.median} for x in points])
    best = found.groupby("mixer", sort=False)["accuracy"].max().sort_values(ascending=False, kind="stable")
    within = {kib: found[found["bytes"] <= 1024 * kib].groupby("mixer")["accuracy"].max() for kib in BUDGETS_KIB}
    table = pd.DataFrame(within, index=best.index).map("{:.3f}".format, na_action="ignore")
    return markdown(table.rename(columns="{:,} KiB".format).reset_index())


def feature_maps(lines: Mapping[tuple[str, str], Sequence[Configuration]]) -> str:
    """Return a table of the accuracy and the KiB of state of feature maps at each width at which there are several."""
    cells = [
        (", ".join(name), point.d_model, f"{_told(point.median)} ({_bytes(point) / 1024:,.0f})")
        for name, line in lines.items()
        for point in line
    ]
    found = pd.DataFrame(cells, columns=["feature map", "width", "cell"])
    several = found.groupby("width")["cell"].transform("size") > 1
    table = found[several].pivot(index="feature map", columns="width", values="cell")
    return markdown(table.reindex(found["feature map"].unique()).rename(columns="D={}".format).reset_index())


def again(stores: Mapping[str, Mapping[str, dict]], shared: Iterable[str]) -> str:
    """Return a table of the accuracies of the runs that every store has, the same but for device and revision."""
    first = next(iter(stores.values()))
    runs = sorted(shared, key=lambda run: learning_rate(first[run]))
    table = {
        "model": [_model(first[run]) for run in runs],
        "learning rate": [f"{learning_rate(first[run]):g}" for run in runs],
        **{name: [_told(accuracy(found[run])) for run in runs] for name, found in stores.items()},
    }
    return markdown(pd.DataFrame(table))


def seconds(folder: Path, init_recipe: str) -> str:
    """Return a table of the seconds of a GPU that the grid's runs took, without second seeds, a line for each file."""
    rows = [(file.name, row) for file in sorted(folder.glob("*.jsonl")) for row in of_recipe(file, init_recipe)]
    runs = pd.DataFrame(
        [(name, row["device"], row["seconds"]) for name, row in rows if row["config"]["seed"] == BASE["seed"]],
        columns=["rows", "device", "seconds"],
    )
    files = runs.groupby("rows")
    table = pd.DataFrame(
        {
            "device": files["device"].agg(lambda devices: ", ".join(sorted(set(devices)))),
            "runs": files.size().map(str),
            "seconds": files["seconds"].sum().map("{:,.0f}".format),
            "longest run": files["seconds"].max().map("{:.0f}".format),
        }
    )
    table.loc["all of them"] = ["", str(len(runs)), f"{runs['seconds'].sum():,.0f}", ""]
    return markdown(table.rename_axis("rows").reset_index())


def _bytes(point: Configuration) -> int:
    return point.state_bytes(convolution=False)


def kernels(rows: Iterable[dict]) -> str:
    """Return a table of the milliseconds in which kernels run, a step of each model, and those of its operation."""
    cells = [(*row["model"].rsplit("_", 1), *_kernels(row)) for row in rows if "kernel_milliseconds" in row]
    found = pd.DataFrame(cells, columns=["model", "width", "all", "own"]).astype({"width": int})
    last = found.drop_duplicates(["model", "width"], keep="last").query("width != 64")
    table = last.pivot(index="model", columns="width").dropna().sort_index(axis=1, level="width")
    table.columns = [f"D={width}" if name == "all" else "its operation" for name, width in table]
    return markdown(table.reset_index())


def _kernels(row: dict) -> tuple[str, str]:
    """Return the milliseconds of all kernels of a step, and of its operation's."""
    own = sum(spent for kernel, spent, _ in row["top"] if kernel.startswith(OPERATION_KERNELS))
    return f"{row['kernel_milliseconds']:.2f}", f"{own:.2f}" if own else "-"


def gains(rows: Iterable[dict]) -> tuple[str, str]:
    """Return tables of seconds of a trial's epoch by each way, and of trials an hour more by lanes on each segment.

    Raises:
      UserError: a segment was measured in ways in which another one of its model was not.
    """
    runs = pd.DataFrame([row for row in rows if "error" not in row])
    steps = runs.groupby("segment", sort=False)["steps_per_epoch"].last()
    runs["milliseconds"] /= runs["lanes"]
    ways = ["way", "lanes", "segment"]
    times = runs.pivot_table(index="model", columns=ways, values="milliseconds", aggfunc="last", sort=False)
    measured = [(*way, segment) for way in times.columns.droplevel("segment").unique() for segment in steps.index]
    times = times.reindex(columns=pd.MultiIndex.from_tuples(measured, names=ways))
    for model, line in times.iterrows():
        if line.isna().any():
            way, lanes, segment = line.index[line.isna()][0]
            raise UserError(f"{model} has not been measured on every segment: {(way, int(lanes))} lacks {segment}.")
    return _epochs(times, steps), _lanes(times)


def _epochs(times: pd.DataFrame, steps: pd.Series) -> str:
    """Return the table of seconds; `times` are milliseconds of a step, by model and (way, lanes, segment)."""
    seconds = times.mul(steps, axis=1, level="segment").T.groupby(["way", "lanes"], sort=False).sum().T / 1e3
    seconds.loc["all of them"] = seconds.sum()
    table = seconds.map("{:.2f}".format)
    table.columns = [WAY_NAMES.get(way, f"{lanes} lanes") for way, lanes in seconds]
    table["loop / best"] = (seconds["loop", 1] / seconds.min(axis=1)).map("{:.1f}".format)
    return markdown(table.rename_axis("model").reset_index())


def _lanes(times: pd.DataFrame) -> str:
    """Return the table of how many more trials an hour the best number of lanes trains than one at a time."""
    best = times["lanes"].T.groupby("segment", sort=False).min().T
    return markdown((times["resident"][1] / best - 1).map("{:.0%}".format).reset_index())

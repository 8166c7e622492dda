"""Pictures of the rows in results/: time against length and batch, short sequences, the other operations, training.

Each is there as PNG, SVG and PDF.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from based_jax.bench.catalogue.operation import BOTH, FORWARD, PASSES, Shape
from based_jax.errors import UserError
from based_jax.pictures import paper, styles
from experiments.kernels import results

PASS_TITLES = {FORWARD: "forward", BOTH: "forward + backward"}
CURVES = {
    ("taylor_attention", "hopper_chunks"): ("Taylor, ours", styles.BLUE, "circle"),
    ("taylor_attention", "xla_chunks"): ("Taylor, chunked, XLA", styles.STEEL, "square"),
    ("taylor_attention", "xla_quadratic"): ("Taylor, quadratic, XLA", styles.PLUM, "diamond"),
    ("taylor_attention", "fla_parallel_based"): ("Taylor, FLA parallel_based", styles.RED, "triangle"),
    ("taylor_attention", "fla_fused_chunk_based"): ("Taylor, FLA fused_chunk_based", styles.ORANGE, "down"),
    ("attention", "cudnn_flash"): ("attention d=64, cuDNN", styles.GREEN, "plus"),
    ("attention", "torch_sdpa"): ("attention d=64, torch", styles.OLIVE, "cross"),
}
BARS = {"hopper": ("ours", styles.BLUE), "cudnn": ("cuDNN", styles.GREEN), "xla": ("XLA", styles.STEEL)}
BAR_LABELS = {
    "window_attention_64": "window 64",
    "window_attention_128": "window 128",
    "gated_short_conv": "gated short\nconvolution",
    "residual_rms_norm": "residual +\nRMSNorm",
}
BAR_SHAPE = 8, 16, 2048
FLOOR_NAME = "Taylor, floor"
PANEL_INCHES = 2.4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="rows are read and pictures written here")


def run(args: argparse.Namespace) -> int:
    """Draw what there are rows for.

    Raises:
      UserError: there are none.
    """
    rows = results.measured(args.results)
    losses = pd.DataFrame(results.read(args.results, "training.jsonl"))
    long = [x for x in results.lengths(rows) if x[2] >= results.LONGEST_SHORT_TOKENS]
    brief = [x for x in results.lengths(rows) if x[2] <= results.LONGEST_SHORT_TOKENS]
    batches = results.batches(rows, BAR_SHAPE[2])
    curves = {
        "length": (long, lambda x: x[2], "tokens T (16 heads; B T = 16,384 until B is 1)"),
        "batch": (batches, lambda x: x[0] * x[1], "sequences times heads B H (2,048 tokens)"),
        "short": (brief, lambda x: x[2], "tokens T (16 heads; B T = 16,384)"),
    }
    drawn: list[Path] = []
    for name, (shapes, place, label) in curves.items():
        if len(shapes) > 1:
            drawn += draw_curves(rows, shapes, place, label, args.results / name)
    if any(key[0] in BAR_LABELS and key[3:] == BAR_SHAPE for key in rows):
        drawn += draw_bars(rows, args.results / "others")
    if not losses.empty:
        drawn += draw_losses(losses, args.results / "training")
    if not drawn:
        raise UserError(f"'{args.results}' has no rows to draw: they are in bench*.jsonl and training.jsonl.")
    print(f"Drawn: {', '.join(map(str, drawn))}.")
    return 0


@matplotlib.rc_context(styles.PAPER)
def draw_curves(
    rows: dict, shapes: Sequence[Shape], place: Callable[[Shape], int], label: str, path: Path
) -> list[Path]:
    """Draw the time of each implementation against one number of the shapes, a panel for each pass."""
    used = [row for row in rows.values() if results.where(row) in shapes]
    names = [name for name, *_ in CURVES.values()]
    figure = paper.sheet(styles.PAGE_INCHES, PANEL_INCHES, [*names, FLOOR_NAME], _devices(used))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, which in zip(panels, PASSES, strict=True):
        for (op, impl), (name, colour, marker) in CURVES.items():
            points = [(place(x), results.time_of(rows, op, impl, which, x)) for x in shapes]
            _line(axes, points, **styles.marked(colour, marker), label=name)
        floors = [(place(x), results.floor_of(rows, "taylor_attention", which, x)) for x in shapes]
        _line(axes, floors, color="black", ls=":", label=FLOOR_NAME)
        ticks = sorted({place(x) for x in shapes})
        axes.set(yscale="log", xlabel=label, title=PASS_TITLES[which])
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:,}" if x < 1024 else f"{x // 1024}K" for x in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    panels[0].set_ylabel("microseconds")
    paper.add_legend(figure, panels[0])
    return paper.save(figure, path)


def _line(axes: Axes, points: Sequence[tuple[int, float | None]], **form: Any) -> None:
    """Draw the points that were measured, if they make a line."""
    known = [(x, y) for x, y in points if y is not None]
    if len(known) > 1:
        axes.plot(*zip(*known, strict=True), **form)


@matplotlib.rc_context(styles.PAPER)
def draw_bars(rows: dict, path: Path) -> list[Path]:
    """Draw the times of the other operations over their floors, ours beside the libraries'."""
    ops = [op for op in BAR_LABELS if any(key[0] == op and key[3:] == BAR_SHAPE for key in rows)]
    used = [row for key, row in rows.items() if key[0] in ops and key[3:] == BAR_SHAPE]
    told = f"(B, H, T) = {BAR_SHAPE}, 64 channels a head; microseconds above the bars"
    names = [name for name, _ in BARS.values()]
    figure = paper.sheet(styles.PAGE_INCHES, PANEL_INCHES, ["floor", *names], [told, *_devices(used)])
    panels = figure.subplots(1, 2, sharey=True)
    for axes, which in zip(panels, PASSES, strict=True):
        _draw_ops(axes, rows, ops, which)
        axes.set_title(PASS_TITLES[which])
    panels[0].set_ylabel("time over floor")
    paper.add_legend(figure, panels[0])
    return paper.save(figure, path)


def _draw_ops(axes: Axes, rows: dict, ops: Sequence[str], which: str) -> None:
    """Draw a group of bars for each operation."""
    width = 0.8 / len(BARS)
    for i, (impl, (name, colour)) in enumerate(BARS.items()):
        rows_of_ops = ((place, results.row_of(rows, op, impl, which, BAR_SHAPE)) for place, op in enumerate(ops))
        found = {place: row for place, row in rows_of_ops if row}
        places = [place + (i - (len(BARS) - 1) / 2) * width for place in found]
        bars = axes.bar(places, [row["ratio_to_floor"] for row in found.values()], width, color=colour, label=name)
        axes.bar_label(bars, [f"{row['microseconds']:.0f}" for row in found.values()])
    axes.axhline(1, color="black", ls=":", label="floor")
    axes.set_xticks(range(len(ops)), [BAR_LABELS[op] for op in ops])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)


@matplotlib.rc_context(styles.PAPER)
def draw_losses(rows: pd.DataFrame, path: Path) -> list[Path]:
    """Draw the loss of each training run."""
    runs = rows.groupby("impl", sort=False)["loss"]
    names = [f"implementation {name}" for name in runs.groups]
    told = ["MQAR, gated convolution + Taylor attention, bf16"]
    figure = paper.sheet(styles.COLUMN_INCHES, 1.9, names, told)
    axes = figure.subplots()
    for i, (name, (_, losses)) in enumerate(zip(names, runs, strict=True)):
        axes.plot(range(1, len(losses) + 1), losses, color=styles.COLOURS[i], ls=styles.DASHES[i], label=name)
    axes.set(xlabel="step", ylabel="training loss")
    paper.add_legend(figure, axes)
    return paper.save(figure, path)


def _devices(rows: Sequence[dict]) -> list[str]:
    """Return what measured rows, as a note of a picture."""
    return [" and ".join(dict.fromkeys(row["device"] for row in rows))]

"""Pictures of the rows in results/: time against length and batch, short sequences, the other operations, training."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from based_jax.bench.catalogue.operation import BOTH, FORWARD, PASSES, Shape
from experiments.kernels import results

PASS_TITLES = {FORWARD: "forward", BOTH: "forward + backward"}
CURVES = {
    ("taylor_attention", "hopper_chunks"): ("Taylor, ours", "tab:blue", "o"),
    ("taylor_attention", "xla_chunks"): ("Taylor, chunked, XLA", "tab:gray", "s"),
    ("taylor_attention", "xla_quadratic"): ("Taylor, quadratic, XLA", "tab:purple", "D"),
    ("taylor_attention", "fla_parallel_based"): ("Taylor, FLA parallel_based", "tab:red", "^"),
    ("taylor_attention", "fla_fused_chunk_based"): ("Taylor, FLA fused_chunk_based", "tab:orange", "v"),
    ("attention", "cudnn_flash"): ("attention d=64, cuDNN", "tab:green", "P"),
    ("attention", "torch_sdpa"): ("attention d=64, torch", "tab:olive", "X"),
}
BARS = {"hopper": ("ours", "tab:blue"), "cudnn": ("cuDNN", "tab:green"), "xla": ("XLA", "tab:gray")}
BAR_LABELS = {
    "window_attention_64": "window 64",
    "window_attention_128": "window 128",
    "gated_short_conv": "gated short\nconvolution",
    "residual_rms_norm": "residual +\nRMSNorm",
}
BAR_SHAPE = 8, 16, 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="rows are read and pictures written here")


def run(args: argparse.Namespace) -> int:
    """Draw what there are rows for."""
    rows = results.measured(args.results)
    long = [x for x in results.lengths(rows) if x[2] >= results.LONGEST_SHORT_TOKENS]
    brief = [x for x in results.lengths(rows) if x[2] <= results.LONGEST_SHORT_TOKENS]
    batches = results.batches(rows, BAR_SHAPE[2])
    curves = {
        "length.png": (long, lambda x: x[2], "tokens T (16 heads; B T = 16,384 until B is 1)"),
        "batch.png": (batches, lambda x: x[0] * x[1], "sequences times heads B H (2,048 tokens)"),
        "short.png": (brief, lambda x: x[2], "tokens T (16 heads; B T = 16,384)"),
    }
    for name, (shapes, place, label) in curves.items():
        if len(shapes) > 1:
            draw_curves(rows, shapes, place, label, args.results / name)
    draw_bars(rows, args.results / "others.png")
    draw_losses(args.results)
    return 0


def draw_curves(rows: dict, shapes: Sequence[Shape], place: Callable[[Shape], int], label: str, path: Path) -> None:
    """Draw the time of each implementation against one number of the shapes, a panel for each pass."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, which in zip(axes, PASSES, strict=True):
        for (op, impl), (name, colour, marker) in CURVES.items():
            points = [(place(x), results.time_of(rows, op, impl, which, x)) for x in shapes]
            _line(axis, points, f"{marker}-", color=colour, ms=5, label=name)
        floors = [(place(x), results.floor_of(rows, "taylor_attention", which, x)) for x in shapes]
        _line(axis, floors, "k:", label="Taylor, floor")
        ticks = sorted({place(x) for x in shapes})
        axis.set(yscale="log", xlabel=label, title=PASS_TITLES[which])
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{x:,}" if x < 1024 else f"{x // 1024}K" for x in ticks])
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        axis.grid(alpha=0.3)
    used = [row for row in rows.values() if results.where(row) in shapes]
    axes[0].set_ylabel("microseconds, " + " and ".join(dict.fromkeys(row["device"] for row in used)))
    _legend(figure, axes[0], columns=4)
    figure.savefig(path, dpi=120)


def _line(axis, points: Sequence[tuple[int, float | None]], style: str, **options: Any) -> None:
    """Draw the points that were measured, if they make a line."""
    known = [(x, y) for x, y in points if y is not None]
    if len(known) > 1:
        axis.plot(*zip(*known, strict=True), style, **options)


def draw_bars(rows: dict, path: Path) -> None:
    """Draw the times of the other operations over their floors, ours beside the libraries'."""
    ops = [op for op in BAR_LABELS if any(key[0] == op and key[3:] == BAR_SHAPE for key in rows)]
    if not ops:
        return
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    width = 0.8 / len(BARS)
    for axis, which in zip(axes, PASSES, strict=True):
        for i, (impl, (name, colour)) in enumerate(BARS.items()):
            rows_of_ops = ((place, results.row_of(rows, op, impl, which, BAR_SHAPE)) for place, op in enumerate(ops))
            found = {place: row for place, row in rows_of_ops if row}
            places = [place + (i - (len(BARS) - 1) / 2) * width for place in found]
            bars = axis.bar(places, [row["ratio_to_floor"] for row in found.values()], width, color=colour, label=name)
            axis.bar_label(bars, [f"{row['microseconds']:.0f}" for row in found.values()], fontsize=8)
        axis.axhline(1, color="k", ls=":", lw=1, label="floor")
        axis.set_xticks(range(len(ops)), [BAR_LABELS[op] for op in ops])
        axis.set_title(f"{PASS_TITLES[which]}; microseconds above the bars")
        axis.grid(axis="y", alpha=0.3)
    devices = dict.fromkeys(row["device"] for key, row in rows.items() if key[0] in ops)
    axes[0].set_ylabel(f"time over floor, {' and '.join(devices)}")
    figure.suptitle(f"(B, H, T) = {BAR_SHAPE}, 64 channels a head", fontsize=10)
    _legend(figure, axes[0], columns=4)
    figure.savefig(path, dpi=120)


def draw_losses(folder: Path) -> None:
    """Draw the loss of each training run, and its difference from the XLA run's."""
    rows = pd.DataFrame(results.read(folder, "training.jsonl"))
    if rows.empty:
        return
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for impl, losses in rows.groupby("impl", sort=False)["loss"]:
        axis.plot(range(1, len(losses) + 1), losses, label=impl, alpha=0.7)
    axis.set(xlabel="step", ylabel="training loss", title="MQAR, gated convolution + Taylor attention, bf16")
    axis.grid(alpha=0.3)
    axis.legend(title="implementation")
    figure.savefig(folder / "training.png", dpi=120)


def _legend(figure, axis, columns: int) -> None:
    """Put one legend for all panels below them."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)

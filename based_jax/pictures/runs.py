"""Pictures of training runs: loss, evaluation, learning rate and throughput of several, as files and as a page."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from based_jax.pictures import paper, styles, web
from based_jax.pictures.curves import QUANTITIES, Curve, Run

TITLE = "Training runs"
COLUMNS, PANEL_INCHES = 3, 1.55
LOG_SCALED = ("grad_norm",)
NOISY = ("loss", "grad_norm", "tokens_per_second")
"""Quantities of single batches: pale, beneath their means, where there are many."""
FEW_POINTS, MANY_POINTS = 25, 100
"""Up to which a curve's points are marked, and from which on means are drawn."""
ROUND_STEPS = (1, 2, 2.5, 5, 10)
"""Between ticks."""


def draw(runs: Sequence[Run], path: str | os.PathLike) -> list[Path]:
    """Draw a panel for each quantity that a run has, as PNG, SVG and PDF, and return the files.

    Args:
      runs: of `curves.read_runs`.
      path: of the picture, whatever its ending.

    Raises:
      UserError: the files cannot be written.
    """
    return paper.save(runs_figure(runs), path)


@matplotlib.rc_context(styles.PAPER)
def runs_figure(runs: Sequence[Run]) -> Figure:
    """Return what `draw` draws."""
    quantities = drawn_quantities(runs)
    lines = -(-len(quantities) // COLUMNS)
    lost = sum(len(curve.lost) for run in runs for curve in run.curves.values())
    entries = [run.name for run in runs] + [_lost_entry(lost)] * bool(lost)
    figure = paper.sheet(styles.PAGE_INCHES, PANEL_INCHES * lines, entries, _notes(runs))
    panels = list(figure.subplots(lines, COLUMNS, squeeze=False, sharex=True).flat)
    for axes, key in zip(panels, quantities, strict=False):
        for number, run in enumerate(runs):
            if key in run.curves:
                _draw_curve(axes, key, run.curves[key], run_form(number))
        _scale(axes, key, [run.curves[key] for run in runs if key in run.curves])
    panels[0].set_xlim(_step_range(runs))
    for axes in panels[len(quantities) :]:
        axes.set_axis_off()
    for number, run in enumerate(runs):
        panels[0].plot([], [], **run_form(number), label=run.name)
    if lost:
        panels[0].plot([], [], "x", color=styles.QUIET, label=_lost_entry(lost))
    paper.add_legend(figure, panels[0])
    return figure


def page(runs: Sequence[Run], path: str | os.PathLike, *, title: str = TITLE) -> Path:
    """Write the page of the runs, and return its path.

    Raises:
      UserError: the file cannot be written.
    """
    data = {
        "quantities": [[key, QUANTITIES[key]] for key in drawn_quantities(runs)],
        "logScaled": LOG_SCALED,
        "runs": [_run(number, run) for number, run in enumerate(runs)],
    }
    sheets = ["page.css", "runs.css"]
    return web.write(path, "runs.html", title=title, data=data, styles=sheets, script="runs.js")


def drawn_quantities(runs: Sequence[Run]) -> list[str]:
    """Return the keys of `QUANTITIES` that a run has."""
    return [key for key in QUANTITIES if any(key in run.curves for run in runs)]


def run_form(number: int) -> dict[str, Any]:
    """Return the colour and the dashes of the n-th run."""
    again, colour = divmod(number, len(styles.COLOURS))
    return {"color": styles.COLOURS[colour], "ls": styles.DASHES[again % len(styles.DASHES)]}


def _run(number: int, run: Run) -> dict[str, Any]:
    form = run_form(number)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "device": run.device,
        "lastStep": run.last_step,
        "colour": form["color"],
        "dashes": styles.DASHES.index(form["ls"]),
        "curves": {key: _points(curve) for key, curve in run.curves.items()},
    }


def _points(curve: Curve) -> dict[str, Any]:
    """Return a curve as the page has it: what is shown of it, how many there are, and its last and best value."""
    shown = curve.thinned()
    known = curve.values[~np.isnan(curve.values)]
    extremes = {name: float(f(known)) if len(known) else None for name, f in (("least", np.min), ("most", np.max))}
    values = [None if np.isnan(value) else float(f"{value:.6g}") for value in shown.values]
    return {"steps": shown.steps.tolist(), "values": values, "count": len(curve.steps), **extremes}


def _draw_curve(axes: Axes, key: str, curve: Curve, form: dict[str, Any]) -> None:
    """Draw a line, its points where they are few, and at the upper edge where it ceased to be finite."""
    marker: dict[str, Any] = {"marker": "o", "ms": 2} if len(curve.steps) <= FEW_POINTS else {}
    line = curve
    if key in NOISY and len(curve.steps) >= MANY_POINTS:
        pale = curve.thinned()
        axes.plot(pale.steps, pale.values, **form | {"ls": "-", "lw": 0.4, "alpha": 0.3})
        line = curve.smoothed()
    line = line.thinned()
    axes.plot(line.steps, line.values, **form, **marker)
    if len(lost := curve.lost_from):
        edge: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
        axes.plot(lost, [1.0] * len(lost), "x", color=form["color"], **edge)


def _step_range(runs: Sequence[Run]) -> tuple[float, float]:
    """Return where steps begin and end, with a little room."""
    steps = np.concatenate([curve.steps for run in runs for curve in run.curves.values()])
    room = max(1, 0.03 * (steps.max() - steps.min()))
    return steps.min() - room, steps.max() + room


def _scale(axes: Axes, key: str, curves: Sequence[Curve]) -> None:
    axes.set_title(QUANTITIES[key], pad=7)
    axes.set_xlabel("step")
    axes.tick_params(labelbottom=True)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=ROUND_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    values = np.concatenate([curve.values[~np.isnan(curve.values)] for curve in curves])
    if key in LOG_SCALED and len(values) and values.min() > 0:
        axes.set_yscale("log")
        narrow = values.max() < 100 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """Return a number in few characters: 0.25, 30k, 2M, 1e-4."""
    for unit, power in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(power, 1e4):
            return f"{value / power:g}{unit}"
    return f"{value:g}"


def _lost_entry(count: int) -> str:
    return f"not finite ({count})"


def _notes(runs: Sequence[Run]) -> list[str]:
    """Return how far the runs have come, and on what."""
    steps = ", ".join(f"{step:,}" for step in dict.fromkeys(run.last_step for run in runs))
    devices = " and ".join(sorted({run.device for run in runs if run.device}))
    pale = any(len(x.curves[key].steps) >= MANY_POINTS for x in runs for key in NOISY if key in x.curves)
    told = f"{len(runs)} run{'s' * (len(runs) > 1)}, to step {steps}" + f"; {devices}" * bool(devices)
    return [told + "; pale: single batches, lines: their means" * pale]

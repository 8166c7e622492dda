"""Pictures of a sweep's rows: recall against bytes of state, feature maps against width, and Based's parts.

Each is saved as PNG and SVG, the same bytes for the same rows.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from based_jax.errors import UserError
from based_jax.sweep import families, published
from based_jax.sweep.best import Best, Row, best, front, longest_test

MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v", "plus": "P", "cross": "X"}
SOURCES = {published.PAPER: ("o", "published: paper, Fig. 2"), published.RERUN: ("s", "published: re-run, 2026")}
PARTS = {"conv": "conv", "base_conv": "conv", "window": "window", "taylor": "Taylor", "linear": "linear"}
MAPS = {"taylor": "Taylor, 2nd order"}
Points = Sequence[Best]


def frontier(rows: Iterable[Row], path: str | os.PathLike, *, convolution: bool = False) -> list[Path]:
    """Draw accuracy against bytes of state, a line along the front of each family, and published points behind.

    The published points are there where all rows have the tests of their protocol.

    Args:
      rows: of a store.
      path: of the picture; its ending is replaced by .png and .svg.
      convolution: count short-convolution layers; see `accounting.state_elements`.

    Returns:
      the two files.

    Raises:
      UserError: there are no rows, or one is not of a sweep.
    """
    points = _points(rows)
    theirs = published.comparable(x.row for x in points)
    styles = families.styles([*(x.family for x in points), *(x.family for x in theirs)])
    figure, axes = _figure(8.6 if len(styles) < 20 else 11, 5)
    _draw_published(axes, theirs, styles, convolution)
    for name, style in styles.items():
        _draw_family(axes, name, [x for x in points if x.family == name], style, convolution)
    counted = "with convolution layers" if convolution else "main mixers only"
    axes.set(title="Recall against bytes of state", ylabel="accuracy, mean over all test segments")
    axes.set_xlabel(f"state of one sequence of {_longest(points)} tokens, fp32, {counted}")
    axes.set_ylim(-0.03, 1.03)
    _byte_axis(axes)
    if theirs:
        _sources(axes)
    _legend(figure)
    return _save(figure, points, path)


def figure3(rows: Iterable[Row], path: str | os.PathLike) -> list[Path]:
    """Draw accuracy against width, a line for each feature map of linear attention; other mixers' rows are left out.

    Arguments, returned files and errors are those of `frontier`.
    """
    points = [x for x in _points(rows) if _map(x)]
    if not points:
        raise UserError("No row has a mixer 'linear' or 'taylor'; figure3 compares their feature maps.")
    figure, axes = _figure(7.4, 4.4)
    for place, name in enumerate(sorted({_map(x) for x in points}, key=lambda name: (name not in MAPS.values(), name))):
        mine = sorted((x for x in points if _map(x) == name), key=lambda x: x.d_model)
        # One of several feature widths, or options, at a model width: the best.
        tops = [max((x for x in mine if x.d_model == d), key=lambda x: x.median) for d in {x.d_model: 0 for x in mine}]
        colour, marker = families.COLOURS[place % len(families.COLOURS)], list(MARKERS.values())[place % len(MARKERS)]
        axes.plot([x.d_model for x in tops], [x.median for x in tops], marker=marker, color=colour, ms=5, label=name)
        _bars(axes, tops, [x.d_model for x in tops], colour)
    widths = sorted({x.d_model for x in points})
    axes.set(xlabel="model width D", ylabel="accuracy", ylim=(-0.03, 1.03), title="Feature maps of linear attention")
    axes.set_xticks(widths, [str(d) for d in widths])
    _legend(figure)
    return _save(figure, points, path)


def ablation(rows: Iterable[Row], path: str | os.PathLike) -> list[Path]:
    """Draw one bar for each combination of Based's parts, its best configuration; other models' rows are left out.

    Arguments, returned files and errors are those of `frontier`.
    """
    points = [x for x in _points(rows) if _parts(x)]
    if not points:
        raise UserError(f"No row is of {', '.join(PARTS)} alone; ablation compares them.")
    order = list(dict.fromkeys(PARTS.values()))
    combinations = sorted({_parts(x) for x in points}, key=lambda parts: (len(parts), [order.index(x) for x in parts]))
    tops = [max((x for x in points if _parts(x) == parts), key=lambda x: x.median) for parts in combinations]
    figure, axes = _figure(1.6 + 1.15 * max(3, len(tops)), 4.2)
    axes.bar(range(len(tops)), [x.median for x in tops], 0.65, color=families.COLOURS[0])
    _bars(axes, tops, range(len(tops)), "0.2")
    for place, point in enumerate(tops):
        axes.annotate(f"{point.median:.3f}", (place, point.high), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(tops)), ["\n+ ".join(parts) for parts in combinations])
    axes.set(ylabel="accuracy", ylim=(0, 1.09), title="Parts of Based, alone and together")
    axes.grid(axis="x", visible=False)
    return _save(figure, tops, path)


def _points(rows: Iterable[Row]) -> list[Best]:
    points = best(rows)
    if not points:
        raise UserError("There are no rows to draw; run the sweep first.")
    return points


def _map(point: Best) -> str:
    """Return the feature map of a model whose one main mixer is linear attention, else ""."""
    found = {options.get("feature_map", MAPS.get(kind, "")) for kind, options in point.layers if kind not in _CONVS}
    return found.pop() if len(found) == 1 else ""


_CONVS = [kind for kind, part in PARTS.items() if part == "conv"]


def _parts(point: Best) -> tuple[str, ...]:
    """Return the parts of Based that a model consists of, () where there are others in it."""
    kinds = {kind for kind, _ in point.layers}
    return () if kinds - PARTS.keys() else tuple(dict.fromkeys(PARTS[kind] for kind in PARTS if kind in kinds))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure that keeps room for a line below the axes."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(rect=(0, 0.025, 1, 0.975)))
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _draw_published(
    axes: Axes, points: Sequence[published.Published], styles: dict[str, families.Style], convolution: bool
) -> None:
    for point in points:
        colour, (marker, _) = styles[point.family].colour, SOURCES[point.source]
        place = point.state_bytes(convolution=convolution), point.accuracy
        axes.plot(*place, marker, color=colour, mfc="none", ms=6, alpha=0.4, zorder=1)


def _draw_family(axes: Axes, name: str, points: Points, style: families.Style, convolution: bool) -> None:
    """Draw our points and their front; for a family without any, the colour that its published points have."""
    if not points:
        axes.plot([], [], "s", color=style.colour, alpha=0.4, ms=6, label=name)
        return
    places = [x.state_bytes(convolution=convolution) for x in points]
    line = front(zip(places, [x.median for x in points], strict=True))
    axes.plot(*zip(*line, strict=True), color=style.colour, lw=1.5, zorder=2)
    options: dict[str, Any] = {"color": style.colour, "ls": "", "marker": MARKERS[style.marker]}
    axes.plot(places, [x.median for x in points], **options, ms=6, mec="white", mew=0.6, label=name, zorder=3)
    _bars(axes, points, places, style.colour)


def _bars(axes: Axes, points: Points, places: Iterable[float], colour: str) -> None:
    """Draw the range over seeds, where there are several."""
    for point, place in zip(points, places, strict=True):
        if len(point.chosen) > 1:
            span = [[point.median - point.low], [point.high - point.median]]
            axes.errorbar([place], [point.median], span, color=colour, capsize=2.5, lw=1, zorder=2)


def _byte_axis(axes: Axes) -> None:
    """Scale by powers of two, and write every second one."""
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    ticks = [1 << n for n in range(0, 50, 2) if low <= 1 << n <= high]
    axes.set_xticks(ticks, [byte_text(x) for x in ticks])
    axes.minorticks_off()


def byte_text(size: float) -> str:
    """Return bytes in the largest unit of which there is one: "64 KiB"."""
    for unit, power in (("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):,.3g} {unit}"
    return f"{size:.0f} B"


def _sources(axes: Axes) -> None:
    """Put the published points' markers into the legend."""
    for marker, name in SOURCES.values():
        axes.plot([], [], marker, color="0.4", mfc="none", alpha=0.6, label=name)


def _legend(figure: Figure) -> None:
    columns = 1 + len(figure.axes[0].get_legend_handles_labels()[0]) // 25
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, borderaxespad=1, ncols=columns)


def _longest(points: Points) -> str:
    return " or ".join(f"{x:,}" for x in sorted({longest_test(point.row) for point in points}))


def _save(figure: Figure, points: Points, path: str | os.PathLike) -> list[Path]:
    """Write both files, with what made the numbers below the axes."""
    rows = [row for point in points for row in point.rows]
    devices = " and ".join(sorted({str(row.get("device")) for row in rows}))
    revisions = ", ".join(sorted({str(row["revision"])[:8] for row in rows if row.get("revision")}))
    text = f"{len(points)} configurations, {len(rows)} runs, {devices}" + (f", revision {revisions}" * bool(revisions))
    figure.text(0.005, 0.003, text, fontsize=6.5, color="0.4")
    files = [Path(path).with_suffix(ending) for ending in (".png", ".svg")]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "based_jax", "svg.fonttype": "none"}):
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files

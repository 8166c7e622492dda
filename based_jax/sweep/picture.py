"""Pictures of a sweep's rows: recall against bytes of state, feature maps of linear attention, and Based's parts.

Each is saved as PNG and SVG, the same bytes for the same rows.
"""

import itertools
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
from based_jax.sweep.best import Best, Row, best, by_feature_map, front, longest_test

MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v", "plus": "P", "cross": "X"}
SOURCES = {published.PAPER: ("o", "published: paper, Fig. 2"), published.RERUN: ("s", "published: re-run, 2026")}
PARTS = {"conv": "conv", "base_conv": "conv", "window": "window", "taylor": "Taylor", "linear": "linear"}
FORMS: tuple[dict[str, Any], ...] = ({"ls": "-"}, {"ls": "--", "mfc": "white"}, {"ls": ":", "mfc": "0.75"})
"""Of lines, for the dimensions of feature maps: those of the model's width first."""
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
    axes.set(title="Recall against bytes of state", ylabel="accuracy, mean over all test segments")
    axes.set(xlabel=_state_of(points, convolution=convolution), ylim=(-0.03, 1.03))
    _byte_axis(axes)
    if theirs:
        _sources(axes)
    _legend(figure)
    return _save(figure, points, path)


def figure3(rows: Iterable[Row], path: str | os.PathLike) -> list[Path]:
    """Draw accuracy against bytes of state, and against parameters, for each feature map of linear attention.

    A line goes over the widths D of a map of K = D dimensions of queries and keys, or of one of fewer. Other mixers'
    rows are left out. Arguments, returned files and errors are those of `frontier`.
    """
    lines = by_feature_map(_points(rows))
    points = [point for line in lines.values() for point in line]
    if not points:
        raise UserError("No row has a mixer 'linear' or 'taylor'; figure3 compares their feature maps.")
    figure, (left, right) = _figure(10, 4.6, panels=2)
    styles = families.styles(name for name, _ in lines)
    drawn = {dimensions for _, dimensions in lines}
    fixed = sorted(drawn - {"K = D"}, key=lambda text: (len(text), text))
    forms = dict(zip(["K = D", *fixed], itertools.cycle(FORMS)))
    for (name, dimensions), line in lines.items():
        for axes, places in (
            (left, [x.state_bytes(convolution=False) for x in line]),
            (right, [x.row["params"] for x in line]),
        ):
            axes.plot(places, [x.median for x in line], **_marked(styles[name]), **forms[dimensions])
            _bars(axes, line, places, styles[name].colour)
    for name, style in styles.items():
        left.plot([], [], **_marked(style), ls="", label=name)
    for dimensions in filter(drawn.__contains__, forms):
        left.plot([], [], **_marked(families.Style("0.4", "circle")), **forms[dimensions], label=dimensions)
    for axes in (left, right):
        axes.set(ylabel="accuracy, mean over all test segments", ylim=(-0.03, 1.03))
    left.set(xlabel=_state_of(points, convolution=False))
    right.set(xlabel="parameters")
    right.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    figure.suptitle("Feature maps of linear attention")
    _byte_axis(left)
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


def _marked(style: families.Style) -> dict[str, Any]:
    return {"color": style.colour, "marker": MARKERS[style.marker], "ms": 5}


def _parts(point: Best) -> tuple[str, ...]:
    """Return the parts of Based that a model consists of, () where there are others in it."""
    kinds = {kind for kind, _ in point.layers}
    return () if kinds - PARTS.keys() else tuple(dict.fromkeys(PARTS[kind] for kind in PARTS if kind in kinds))


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Any]:
    """Return a figure that keeps room for a line below, and its axes: one, or as many beside each other."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(rect=(0, 0.025, 1, 0.975)))
    panel = figure.subplots(1, panels)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure, panel


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


def _state_of(points: Points, *, convolution: bool) -> str:
    """Return what an axis of bytes counts."""
    longest = " or ".join(f"{x:,}" for x in sorted({longest_test(point.row) for point in points}))
    counted = "with convolution layers" if convolution else "main mixers only"
    return f"state of one sequence of {longest} tokens, fp32, {counted}"


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

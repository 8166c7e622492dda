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
from based_jax.pictures import references, styles
from based_jax.pictures.configurations import Configuration, Row, by_feature_map, configurations, front, longest_test
from based_jax.pictures.references import ReferencePoint
from based_jax.pictures.styles import Style

FRONTIER_TITLE = "Recall against bytes of state"
"""Of the frontier."""
MATPLOTLIB_MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "down": "v",
    "plus": "P",
    "cross": "X",
}
BASED_PARTS = {"conv": "conv", "base_conv": "conv", "window": "window", "taylor": "Taylor", "linear": "linear"}
LINE_FORMS: tuple[dict[str, Any], ...] = ({"ls": "-"}, {"ls": "--", "mfc": "white"}, {"ls": ":", "mfc": "0.75"})
"""Of lines, for the dimensions of feature maps: those of the model's width first."""
Points = Sequence[Configuration]


def frontier(
    rows: Iterable[Row],
    path: str | os.PathLike,
    *,
    published: Sequence[ReferencePoint] = (),
    convolution: bool = False,
) -> list[Path]:
    """Draw accuracy against bytes of state, a line along the front of each family, and published points behind.

    Args:
      rows: of a store.
      path: of the picture; its ending is replaced by .png and .svg.
      published: points of other sources.
      convolution: count short-convolution layers; see `nn.accounting.state_elements`.

    Returns:
      the two files.

    Raises:
      UserError: there are no rows, or one is not of a sweep.
    """
    points = _points(rows)
    style_of = styles.styles([*(x.family for x in points), *(x.family for x in published)])
    figure, axes = _figure(8.6 if len(style_of) < 20 else 11, 5)
    _draw_published(axes, published, style_of, convolution)
    for name, style in style_of.items():
        _draw_family(axes, name, [x for x in points if x.family == name], style, convolution)
    axes.set(title=FRONTIER_TITLE, ylabel="accuracy, mean over all test segments")
    axes.set(xlabel=_state_of(points, convolution=convolution), ylim=(-0.03, 1.03))
    _byte_axis(axes)
    _name_sources(axes, published)
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
    style_of = styles.styles(name for name, _ in lines)
    drawn = {dimensions for _, dimensions in lines}
    fixed = sorted(drawn - {"K = D"}, key=lambda text: (len(text), text))
    forms = dict(zip(["K = D", *fixed], itertools.cycle(LINE_FORMS)))
    for (name, dimensions), line in lines.items():
        for axes, places in (
            (left, [x.state_bytes(convolution=False) for x in line]),
            (right, [x.row["params"] for x in line]),
        ):
            axes.plot(places, [x.median for x in line], **_marked(style_of[name]), **forms[dimensions])
            _bars(axes, line, places, style_of[name].colour)
    for name, style in style_of.items():
        left.plot([], [], **_marked(style), ls="", label=name)
    for dimensions in filter(drawn.__contains__, forms):
        left.plot([], [], **_marked(Style("0.4", "circle")), **forms[dimensions], label=dimensions)
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
        raise UserError(f"No row is of {', '.join(BASED_PARTS)} alone; ablation compares them.")
    order = list(dict.fromkeys(BASED_PARTS.values()))
    combinations = sorted({_parts(x) for x in points}, key=lambda parts: (len(parts), [order.index(x) for x in parts]))
    tops = [max((x for x in points if _parts(x) == parts), key=lambda x: x.median) for parts in combinations]
    figure, axes = _figure(1.6 + 1.15 * max(3, len(tops)), 4.2)
    axes.bar(range(len(tops)), [x.median for x in tops], 0.65, color=styles.COLOURS[0])
    _bars(axes, tops, range(len(tops)), "0.2")
    for place, point in enumerate(tops):
        axes.annotate(f"{point.median:.3f}", (place, point.high), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(tops)), ["\n+ ".join(parts) for parts in combinations])
    axes.set(ylabel="accuracy", ylim=(0, 1.09), title="Parts of Based, alone and together")
    axes.grid(axis="x", visible=False)
    return _save(figure, tops, path)


def _points(rows: Iterable[Row]) -> list[Configuration]:
    points = configurations(rows)
    if not points:
        raise UserError("There are no rows to draw; run the sweep first.")
    return points


def _marked(style: Style) -> dict[str, Any]:
    return {"color": style.colour, "marker": MATPLOTLIB_MARKERS[style.marker], "ms": 5}


def _parts(point: Configuration) -> tuple[str, ...]:
    """Return the parts of Based that a model consists of, () where there are others in it."""
    kinds = {kind for kind, _ in point.layers}
    return (
        ()
        if kinds - BASED_PARTS.keys()
        else tuple(dict.fromkeys(BASED_PARTS[kind] for kind in BASED_PARTS if kind in kinds))
    )


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Any]:
    """Return a figure that keeps room for a line below, and its axes: one, or as many beside each other."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(rect=(0, 0.025, 1, 0.975)))
    panel = figure.subplots(1, panels)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure, panel


def _draw_published(
    axes: Axes, points: Sequence[ReferencePoint], style_of: dict[str, Style], convolution: bool
) -> None:
    markers = references.source_markers(points)
    for point in points:
        colour, marker = style_of[point.family].colour, MATPLOTLIB_MARKERS[markers[point.source]]
        place = point.state_bytes(convolution=convolution), point.accuracy
        axes.plot(*place, marker, color=colour, mfc="none", ms=6, alpha=0.4, zorder=1)


def _draw_family(axes: Axes, name: str, points: Points, style: Style, convolution: bool) -> None:
    """Draw our points and their front; for a family without any, the colour that its published points have."""
    if not points:
        axes.plot([], [], "s", color=style.colour, alpha=0.4, ms=6, label=name)
        return
    places = [x.state_bytes(convolution=convolution) for x in points]
    line = front(zip(places, [x.median for x in points], strict=True))
    axes.plot(*zip(*line, strict=True), color=style.colour, lw=1.5, zorder=2)
    options: dict[str, Any] = {"color": style.colour, "ls": "", "marker": MATPLOTLIB_MARKERS[style.marker]}
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


def _name_sources(axes: Axes, points: Sequence[ReferencePoint]) -> None:
    """Put the published points' markers into the legend."""
    for source, marker in references.source_markers(points).items():
        options: dict[str, Any] = {"color": "0.4", "mfc": "none", "alpha": 0.6}
        axes.plot([], [], MATPLOTLIB_MARKERS[marker], **options, label=f"published: {source.name}")


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

"""Pictures of a sweep's rows: recall against bytes of state, feature maps of linear attention, and Based's parts.

Each is as wide as a column of a paper, or as its page, and saved as PNG, SVG and PDF, the same bytes for the same rows.
"""

import itertools
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from based_jax.errors import UserError
from based_jax.pictures import paper, references, styles
from based_jax.pictures.configurations import Configuration, Row, by_feature_map, configurations, front, longest_test
from based_jax.pictures.panels import AccuracyPanel, accuracy_panels, byte_axis, byte_text, panels_inches
from based_jax.pictures.parts import best_of_each, groups_of_equal_size, parts_of
from based_jax.pictures.references import ReferencePoint
from based_jax.pictures.styles import COLUMN_INCHES, PAGE_INCHES, QUIET, Style, marked

LINE_FORMS: tuple[dict[str, Any], ...] = ({"ls": "-"}, {"ls": "--", "mfc": "white"}, {"ls": ":", "mfc": "0.75"})
"""Of lines, for the dimensions of feature maps: those of the model's width first."""
AXIS_INCHES, BAR_INCHES, BAR_AXIS_INCHES = 0.55, 0.17, 0.45
"""About a panel: its numbers, its label, margins; of a bar with the room about it; below bars."""
Points = Sequence[Configuration]


def frontier(
    rows: Iterable[Row],
    path: str | os.PathLike,
    *,
    published: Sequence[ReferencePoint] = (),
    convolution: bool = False,
    named: Collection[str] = (),
) -> list[Path]:
    """Draw accuracy against bytes of state, a line along the front of each family, and published points behind.

    Args:
      rows: of a store.
      path: of the picture; its ending is replaced by .png, .svg and .pdf.
      published: points of other sources.
      convolution: count short-convolution layers; see `nn.accounting.state_elements`.
      named: families whose points stand out, with their name beside the best one.

    Returns:
      the three files.

    Raises:
      UserError: there are no rows, one is not of a sweep, they are of different tasks or tests, or the files cannot be
        written.
    """
    return paper.save(frontier_figure(rows, published=published, convolution=convolution, named=named), path)


@matplotlib.rc_context(styles.PAPER)
def frontier_figure(
    rows: Iterable[Row],
    *,
    published: Sequence[ReferencePoint] = (),
    convolution: bool = False,
    named: Collection[str] = (),
) -> Figure:
    """Return what `frontier` draws."""
    points = _drawable(rows)
    style_of = styles.styles([*(x.family for x in points), *(x.family for x in published)])
    sources = {source.name: marker for source, marker in references.source_markers(published).items()}
    accuracies = [x.accuracy for x in published] + _accuracies(points)
    entries = [*style_of, *sources, *_diverged_entry(points)]
    told = ["Hollow: published points."] * bool(published) + _notes(points)
    figure = paper.sheet(COLUMN_INCHES, panels_inches(accuracies), entries, told)
    [panel] = accuracy_panels(figure, 1, accuracies, diverged=any(x.diverged_seeds for x in points))
    _draw_published(panel, published, style_of, convolution)
    for name, style in style_of.items():
        _draw_family(panel, name, [x for x in points if x.family == name], style, convolution)
    for name in named:
        others = [(x.state_bytes(convolution=convolution), x.median) for x in points if x.family != name and x.chosen]
        _name_best(panel, name, [x for x in points if x.family == name and x.chosen], others, convolution)
    for name, marker in sources.items():
        panel.axes.plot([], [], ls="", **marked(QUIET, marker), mfc="none", mew=0.75, label=name)
    _name_diverged(panel.axes, points)
    sizes = [x.state_bytes(convolution=convolution) for x in points]
    sizes += [x.state_bytes(convolution=convolution) for x in published]
    byte_axis(panel.axes, sizes, COLUMN_INCHES - AXIS_INCHES)
    panel.axes.set_xlabel(_state_of(points, convolution=convolution))
    paper.add_legend(figure, panel.axes)
    return figure


def figure3(rows: Iterable[Row], path: str | os.PathLike) -> list[Path]:
    """Draw accuracy against bytes of state, and against parameters, for each feature map of linear attention.

    A line goes over the widths D of a map of K = D dimensions of queries and keys, or of one of fewer. Other mixers'
    rows are left out. Arguments, returned files and errors are those of `frontier`.
    """
    return paper.save(figure3_figure(rows), path)


@matplotlib.rc_context(styles.PAPER)
def figure3_figure(rows: Iterable[Row]) -> Figure:
    """Return what `figure3` draws."""
    lines = by_feature_map(_drawable(rows))
    points = [point for line in lines.values() for point in line]
    if not points:
        raise UserError("No row has a mixer 'linear' or 'taylor'; figure3 compares their feature maps.")
    style_of = styles.styles(name for name, _ in lines)
    forms = _line_forms({dimensions for _, dimensions in lines})
    entries = [*style_of, *forms, *_diverged_entry(points)]
    figure = paper.sheet(PAGE_INCHES, panels_inches(_accuracies(points)), entries, _notes(points))
    panels = accuracy_panels(figure, 2, _accuracies(points), diverged=any(x.diverged_seeds for x in points))
    sizes = {x: x.state_bytes(convolution=False) for x in points}
    for panel, place in zip(panels, (sizes, {x: x.row["params"] for x in points}), strict=True):
        for (name, dimensions), line in lines.items():
            _draw_map(panel, line, place, style_of[name], forms[dimensions])
    left, right = (panel.axes for panel in panels)
    for name, style in style_of.items():
        left.plot([], [], **marked(style.colour, style.marker), ls="", label=name)
    for dimensions, form in forms.items():
        left.plot([], [], **marked(QUIET, "circle"), **form, label=dimensions)
    _name_diverged(left, points)
    left.set_xlabel(_state_of(points, convolution=False))
    byte_axis(left, list(sizes.values()), PAGE_INCHES / 2 - AXIS_INCHES)
    right.set_xlabel("parameters")
    right.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    paper.add_legend(figure, left)
    return figure


def ablation(rows: Iterable[Row], path: str | os.PathLike) -> list[Path]:
    """Draw one bar for each combination of Based's parts, its best configuration; other models' rows are left out.

    Models are compared at equal sizes (`parts.groups_of_equal_size`): several, two widths say, are panels below each
    other. Arguments, returned files and errors are those of `frontier`; besides, no model has all the parts.
    """
    return paper.save(ablation_figure(rows), path)


@matplotlib.rc_context(styles.PAPER)
def ablation_figure(rows: Iterable[Row]) -> Figure:
    """Return what `ablation` draws."""
    groups = [(title, best_of_each(group)) for title, group in groups_of_equal_size(_drawable(rows))]
    heights = [BAR_INCHES * (len(group) + 0.6) for _, group in groups]
    height = sum(heights) + len(groups) * 1.6 * paper.LINE_INCHES + BAR_AXIS_INCHES
    figure = paper.sheet(COLUMN_INCHES, height, notes=_notes([x for _, group in groups for x in group]))
    panels = figure.subplots(len(groups), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (title, group) in zip(panels, groups, strict=True):
        _draw_bars(axes, group)
        axes.set_title(title, loc="left")
        axes.set_title("state", loc="right")
    panels[-1].set_xlabel("accuracy", loc="left")
    return figure


def _drawable(rows: Iterable[Row]) -> list[Configuration]:
    """Return the configurations of rows.

    Raises:
      UserError: there are none, or they cannot stand in one picture.
    """
    points = configurations(rows)
    if not points:
        raise UserError("There are no rows to draw; run the sweep first.")
    return points


def _accuracies(points: Points) -> list[float]:
    """Return the highest accuracy of each point that has one."""
    return [x.high for x in points if not math.isnan(x.high)]


def _notes(points: Points) -> list[str]:
    """Return what made the numbers, and how many of the runs diverged."""
    rows = [row for point in points for row in point.rows]
    devices = " and ".join(sorted({str(row.get("device")) for row in rows}))
    revisions = ", ".join(sorted({str(row["revision"])[:8] for row in rows if row.get("revision")}))
    made = f"{len(points)} configurations, {len(rows)} runs, {devices}" + (f", revision {revisions}" * bool(revisions))
    lost = sum(x.diverged_runs for x in points)
    return [f"{lost} of {len(rows)} runs diverged and have no accuracy."] * bool(lost) + [made]


def _diverged_entry(points: Points) -> list[str]:
    """Return the legend's text of points that are marked as diverged, if any are."""
    count = sum(bool(x.diverged_seeds) for x in points)
    return [f"diverged ({count})"] * bool(count)


def _draw_spans(panel: AccuracyPanel, points: Points, places: Iterable[float], colour: str) -> None:
    """Draw the range over seeds, where there are several."""
    for point, place in zip(points, places, strict=True):
        if len(point.chosen) > 1:
            panel.span(place, point.low, point.high, colour)


def _name_diverged(axes: Axes, points: Points) -> None:
    for entry in _diverged_entry(points):
        axes.plot([], [], "x", color=QUIET, mew=1.2, label=entry)


def _line_forms(drawn: set[str]) -> dict[str, dict[str, Any]]:
    """Return the line of each "K = ..." that is drawn, K = D first, then the smaller ones."""
    fixed = sorted(drawn - {"K = D"}, key=lambda text: (len(text), text))
    forms = dict(zip(["K = D", *fixed], itertools.cycle(LINE_FORMS)))
    return {dimensions: form for dimensions, form in forms.items() if dimensions in drawn}


def _draw_map(
    panel: AccuracyPanel, line: Points, place: Mapping[Configuration, float], style: Style, form: Mapping[str, Any]
) -> None:
    """Draw one feature map's line over the widths."""
    places = [place[x] for x in line]
    panel.line(places, [x.median for x in line], **marked(style.colour, style.marker), **form)
    _draw_spans(panel, line, places, style.colour)
    panel.diverged([place[x] for x in line if x.diverged_seeds], style.colour)


def _draw_published(
    panel: AccuracyPanel, points: Sequence[ReferencePoint], style_of: Mapping[str, Style], convolution: bool
) -> None:
    markers = references.source_markers(points)
    for point in points:
        form = marked(style_of[point.family].colour, markers[point.source])
        place = point.state_bytes(convolution=convolution)
        panel.marks([place], [point.accuracy], **form, mfc="none", mew=0.75, alpha=0.45, zorder=1)


def _draw_family(panel: AccuracyPanel, name: str, points: Points, style: Style, convolution: bool) -> None:
    """Draw our points and their front; for a family without any, the colour that its published points have."""
    if not points:
        panel.axes.plot([], [], "s", color=style.colour, alpha=0.45, label=name)
        return
    places = {x: x.state_bytes(convolution=convolution) for x in points}
    known = [x for x in points if x.chosen]
    line = front([(places[x], x.median) for x in known])
    if line:
        panel.line(*zip(*line, strict=True), color=style.colour, zorder=2)
    form = marked(style.colour, style.marker) | {"mec": "white", "mew": 0.4, "zorder": 3}
    panel.axes.plot([], [], ls="", **form, label=name)
    panel.marks([places[x] for x in known], [x.median for x in known], **form)
    _draw_spans(panel, known, [places[x] for x in known], style.colour)
    panel.diverged([places[x] for x in points if x.diverged_seeds], style.colour)


def _name_best(
    panel: AccuracyPanel, name: str, points: Points, others: Sequence[tuple[float, float]], convolution: bool
) -> None:
    """Draw a ring about each point of a family, and its name beside the best one."""
    places = [x.state_bytes(convolution=convolution) for x in points]
    panel.marks(places, [x.median for x in points], marker="o", color="black", ms=9, mfc="none", mew=0.9, zorder=4)
    if points:
        best = max(range(len(points)), key=lambda i: points[i].median)
        panel.name(places[best], points[best].median, name, others)


def _state_of(points: Points, *, convolution: bool) -> str:
    """Return what an axis of bytes counts, in two lines."""
    [longest] = {longest_test(point.row) for point in points}
    counted = "with convolution layers" if convolution else "main mixers only"
    return f"state of one sequence, fp32,\nof {longest:,} tokens, {counted}"


def _draw_bars(axes: Axes, tops: Points) -> None:
    """Draw a horizontal bar for each model, the first on top, with its accuracy and bytes of state."""
    rows = range(len(tops))
    axes.barh(rows, [x.median if x.chosen else 0 for x in tops], 0.65, color=styles.BLUE)
    for row, point in zip(rows, tops, strict=True):
        if len(point.chosen) > 1:
            span = [[point.median - point.low], [point.high - point.median]]
            axes.errorbar([point.median], [row], xerr=span, color="black", capsize=1.5, lw=0.75, capthick=0.75)
        if not point.chosen:
            axes.plot([0], [row], "x", color=styles.BLUE, mew=1.2, clip_on=False)
        told = f"{point.median:.3f}" if point.chosen else "diverged"
        place = point.high if point.chosen else 0, row
        axes.annotate(told, place, (4, 0), textcoords="offset points", va="center")
        size = byte_text(point.state_bytes(convolution=False))
        axes.annotate(size, (1, row), xycoords=("axes fraction", "data"), ha="right", va="center")
    axes.set_yticks(rows, [" + ".join(parts_of(x)) for x in tops])
    axes.set(xlim=(0, 1.7), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1], ylim=(len(tops) - 0.5, -0.5))
    axes.spines.bottom.set_bounds(0, 1)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)

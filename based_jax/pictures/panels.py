"""Panels of accuracy: an axis from 0 to 1 and, of what is above 0.95, a panel above it by the size of the error."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MAGNIFIED_FROM, LEAST_ERROR = 0.95, 1e-3
MAGNIFIED_TICKS = {0.95: "0.95", 0.98: "0.98", 0.99: "0.99", 0.995: "0.995", 0.998: "0.998", 0.999: "≥ 0.999"}
PANEL_INCHES, MAGNIFIER_INCHES, LABELS_INCHES = 1.65, 0.9, 0.42
"""Heights: of accuracies from 0 to 1, of what is magnified, of an axis' numbers and label below."""
MAGNIFIED_SHADE = "0.96"
SIDES = ((1, -1), (1, 1), (-1, -1), (-1, 1))
"""Of a point, right and above, on which its name may stand: the first where nothing is."""
NAME_OCTAVES, NAME_ACCURACY = 2.0, 0.12
"""About what a name takes of an axis of bytes, and of one of accuracies."""
TICK_INCHES, LEAST_DOUBLINGS = 0.45, 2.5
"""Of an axis of bytes: the width of a tick's label and the room about it, and what the axis covers at least."""


@dataclasses.dataclass(frozen=True)
class AccuracyPanel:
    """Axes of accuracies, and those above it that magnify the best of them, on the same horizontal axis."""

    axes: Axes
    magnifier: Axes | None = None

    def line(self, places: Sequence[float], accuracies: Sequence[float], **options: Any) -> None:
        """Draw a line through points; a gap where an accuracy is NaN."""
        self.axes.plot(places, accuracies, **options)
        if self.magnifier:
            self.magnifier.plot(places, _capped(accuracies), **options | {"label": None})

    def marks(self, places: Sequence[float], accuracies: Sequence[float], **options: Any) -> None:
        """Draw a marker at each point."""
        self.axes.plot(places, accuracies, ls="", **options)
        best = [(x, y) for x, y in zip(places, _capped(accuracies), strict=True) if y >= MAGNIFIED_FROM]
        if self.magnifier and best:
            self.magnifier.plot(*zip(*best, strict=True), ls="", **options | {"label": None})

    def span(self, place: float, low: float, high: float, colour: str) -> None:
        """Draw a range at a place."""
        form: dict[str, Any] = {"fmt": "none", "color": colour, "capsize": 1.5, "lw": 0.75, "capthick": 0.75}
        span = [[0.0], [high - low]]
        self.axes.errorbar([place], [low], span, **form)
        if self.magnifier and high >= MAGNIFIED_FROM:
            [low, high] = _capped((low, high))
            span = [[0.0], [high - low]]
            self.magnifier.errorbar([place], [low], span, **form)

    def name(self, place: float, accuracy: float, text: str, others: Sequence[tuple[float, float]] = ()) -> None:
        """Write what a point is beside it, on the side where the fewest of the others, (place, accuracy), would be."""

        def crowd(side: tuple[int, int]) -> int:
            right, above = side
            beside = (0 <= right * math.log2(x / place) <= NAME_OCTAVES for x, _ in others)
            near = (0 <= above * (y - accuracy) <= NAME_ACCURACY for _, y in others)
            return sum(map(operator.and_, beside, near))

        right, above = min(SIDES, key=crowd)
        magnified = self.magnifier is not None and accuracy >= MAGNIFIED_FROM
        axes = self.magnifier if self.magnifier is not None and magnified else self.axes
        [accuracy] = _capped([accuracy])
        aligned: dict[str, Any] = {
            "ha": "left" if right > 0 else "right",
            "va": "bottom" if above > 0 else "top",
        }
        offset = 6 * right, 2 * above
        axes.annotate(text, (place, accuracy), offset, textcoords="offset points", weight="bold", zorder=5, **aligned)

    def diverged(self, places: Sequence[float], colour: str) -> None:
        """Mark, at the lower edge, places where nothing but divergence came out."""
        edge: dict[str, Any] = {"transform": self.axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
        if places:
            self.axes.plot(places, [0.0] * len(places), "x", color=colour, mew=1.2, **edge)


def accuracy_panels(
    figure: Figure, columns: int, accuracies: Sequence[float], *, diverged: bool
) -> list[AccuracyPanel]:
    """Return as many panels beside each other.

    Args:
      figure: of the height `panels_inches`.
      columns: how many.
      accuracies: what will be drawn.
      diverged: leave room below 0, where `AccuracyPanel.diverged` marks.
    """
    if is_magnified(accuracies):
        heights = {"height_ratios": [MAGNIFIER_INCHES, PANEL_INCHES]}
        upper, lower = figure.subplots(2, columns, squeeze=False, sharex="col", gridspec_kw=heights)
    else:
        upper, lower = [None] * columns, figure.subplots(1, columns, squeeze=False)[0]
    panels = [AccuracyPanel(*pair) for pair in zip(lower, upper, strict=True)]
    for panel in panels:
        panel.axes.set(ylim=(-0.12 if diverged else -0.03, 1.03), yticks=np.linspace(0, 1, 6))
        if panel.magnifier:
            _magnify(panel.magnifier)
            panel.axes.axhspan(MAGNIFIED_FROM, 1.03, color=MAGNIFIED_SHADE, lw=0, zorder=0)
    panels[0].axes.set_ylabel("accuracy")
    if panels[0].magnifier:
        panels[0].magnifier.set_ylabel("log of error")
    figure.align_ylabels()
    return panels


def panels_inches(accuracies: Sequence[float]) -> float:
    """Return the height of panels with their labels."""
    return PANEL_INCHES + LABELS_INCHES + MAGNIFIER_INCHES * is_magnified(accuracies)


def is_magnified(accuracies: Sequence[float]) -> bool:
    """Return whether there is something to tell apart above `MAGNIFIED_FROM`."""
    return any(MAGNIFIED_FROM < y < 1 - LEAST_ERROR for y in accuracies)


def _magnify(axes: Axes) -> None:
    """Scale axes by the logarithm of the error, and shade them as what they magnify."""
    axes.set_yscale("function", functions=(lambda y: -np.log10(np.clip(1 - y, 1e-9, None)), lambda z: 1 - 10.0**-z))
    axes.set(ylim=(MAGNIFIED_FROM, 1 - 0.75 * LEAST_ERROR), facecolor=MAGNIFIED_SHADE)
    axes.set_yticks(list(MAGNIFIED_TICKS), list(MAGNIFIED_TICKS.values()))
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.grid(color="white")


def _capped(accuracies: Iterable[float]) -> list[float]:
    return [min(y, 1 - LEAST_ERROR) if y == y else y for y in accuracies]


def byte_axis(axes: Axes, sizes: Sequence[float], inches: float) -> None:
    """Scale by powers of two about these sizes, and write as many of them as there is room for."""
    low, high = np.log2(min(sizes)) - 0.4, np.log2(max(sizes)) + 0.4
    room = max(0, LEAST_DOUBLINGS - (high - low)) / 2
    low, high = low - room, high + room
    axes.set_xscale("log", base=2)
    axes.set_xlim(2**low, 2**high)
    step = math.ceil((high - low) * TICK_INCHES / inches)
    first = math.ceil(low / step) * step
    ticks = [1 << n for n in range(first, math.floor(high) + 1, step)]
    axes.set_xticks(ticks, [byte_text(x) for x in ticks])
    axes.minorticks_off()


def byte_text(size: float) -> str:
    """Return bytes in the largest unit of which there is one: "64 KiB"."""
    for unit, power in (("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):,.3g} {unit}"
    return f"{size:.0f} B"

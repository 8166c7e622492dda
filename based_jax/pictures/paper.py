"""A picture as a paper needs it: as wide as a column, its notes below, saved as PNG, SVG and PDF.

What draws runs under `matplotlib.rc_context(styles.PAPER)`.
"""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path

from based_jax.folders import local_path, make_folder, writing
from based_jax.pictures import styles

FILE_METADATA: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""By ending: without a date, so that the same rows make the same bytes."""
LINE_INCHES = 1.25 * styles.TEXT_POINTS / 72
MARGIN_INCHES = 0.04


def sheet(width: float, height: float, entries: Iterable[str] = (), notes: Iterable[str] = ()) -> Figure:
    """Return a figure with room for panels, below them for a legend of these entries, and notes at the foot.

    Args:
      width: inches, of the whole.
      height: inches, of the panels with their labels.
      entries: the legend's texts; `add_legend` adds it.
      notes: paragraphs.
    """
    inner = width - 2 * MARGIN_INCHES
    lines = [line for note in notes for line in wrapped(note, inner)]
    entries = list(entries)
    legend = (1 + math.ceil(len(entries) / legend_columns(entries, inner))) * LINE_INCHES if entries else 0
    foot = LINE_INCHES * len(lines) + 2 * MARGIN_INCHES
    whole = height + legend + foot
    panels = (0, (legend + foot) / whole, 1, height / whole)
    engine = ConstrainedLayoutEngine(rect=panels, w_pad=MARGIN_INCHES, h_pad=MARGIN_INCHES, hspace=0, wspace=0)
    figure = Figure(figsize=(width, whole), layout=engine)
    if lines:
        place = MARGIN_INCHES / width, MARGIN_INCHES / whole
        text = figure.text(*place, "\n".join(lines), color=styles.QUIET, va="bottom", linespacing=1.2)
        text.set_in_layout(False)
    return figure


def add_legend(figure: Figure, axes: Axes) -> None:
    """Name what these axes have labels for, right below the panels, in the room that `sheet` kept."""
    handles, names = axes.get_legend_handles_labels()
    columns = legend_columns(names, figure.get_figwidth() - 2 * MARGIN_INCHES)
    engine = figure.get_layout_engine()
    top = engine.get()["rect"][1] if engine else 0.0
    legend = figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, top), ncols=columns)
    legend.set_in_layout(False)


def legend_columns(entries: Sequence[str], inches: float) -> int:
    """Return into how many columns of a legend the entries go, in this width."""
    handle, gap, between = (styles.PAPER[f"legend.{x}"] for x in ("handlelength", "handletextpad", "columnspacing"))
    widths = [text_inches(entry) + (handle + gap) * styles.TEXT_POINTS / 72 for entry in entries]

    def whole(columns: int) -> float:
        parts = np.array_split(widths, columns)  # as the legend fills its columns: the first ones are the longer ones
        return sum(max(part) for part in parts) + (columns - 1) * between * styles.TEXT_POINTS / 72

    most = next((columns for columns in range(len(entries), 1, -1) if whole(columns) <= inches), 1)
    return math.ceil(len(entries) / math.ceil(len(entries) / most))  # as many in each, where that takes no more lines


def text_inches(text: str) -> float:
    """Return how wide a line of text is."""
    font = FontProperties(family=styles.PAPER["font.family"], size=styles.TEXT_POINTS)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrapped(text: str, inches: float) -> list[str]:
    """Return the lines of a text, none wider unless a word is."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_inches(f"{lines[-1]} {word}") <= inches:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def save(figure: Figure, path: str | os.PathLike) -> list[Path]:
    """Write the figure as PNG, SVG and PDF, whatever the ending of the path, and return the files.

    Raises:
      UserError: they cannot be written.
    """
    files = {local_path(path, "path").with_suffix(ending): metadata for ending, metadata in FILE_METADATA.items()}
    make_folder(next(iter(files)).parent)
    with matplotlib.rc_context(styles.PAPER):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout that was found, in all files
        for file, metadata in files.items():
            with writing(file):
                figure.savefig(file, metadata=metadata)
    return list(files)

"""How pictures look: a colour and a marker for each family of models, and sizes that suit a column of a paper."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Style:
    """A colour that stands out on white and on black, and a marker of `MARKERS`."""

    colour: str
    marker: str


MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v", "plus": "P", "cross": "X"}
"""What matplotlib calls each."""
BLUE, ORANGE, GREEN, RED, PLUM, TEAL = "#4c96f5", "#dd7610", "#27722a", "#bd432f", "#894d97", "#568f8c"
PINK, OLIVE, VIOLET, TAN, STEEL, MAUVE = "#d1719e", "#646e46", "#7978fb", "#b38c72", "#8395bb", "#7f5c76"
COLOURS = (BLUE, ORANGE, GREEN, RED, PLUM, TEAL, PINK, OLIVE, VIOLET, TAN, STEEL, MAUVE)
"""Three times as light as black, three times as dark as white; far apart also where red and green are one."""
MARKER_POINTS = {"circle": 4, "square": 3.6, "triangle": 4.4, "diamond": 3.5, "down": 4.4, "plus": 4.8, "cross": 4.6}
"""Sizes at which they look as large as each other."""
DASHES = ("-", "--", ":", "-.")
"""Of lines that colours do not tell apart."""
QUIET = "0.4"
"""Of what explains a picture and is no data."""

FAMILY_STYLES = {
    "Based": Style(BLUE, "circle"),
    "Sliding window": Style(ORANGE, "square"),
    "Taylor + window": Style(ORANGE, "plus"),
    "Attention": Style(GREEN, "plus"),
    "Mamba": Style(RED, "triangle"),
    "Mamba-2": Style(PINK, "cross"),
    "DeltaNet": Style(PLUM, "diamond"),
    "Gated DeltaNet": Style(VIOLET, "triangle"),
    "KDA": Style(TEAL, "down"),
    "GLA": Style(TAN, "cross"),
    "RWKV-7": Style(OLIVE, "diamond"),
    "H3": Style(STEEL, "square"),
    "Hyena": Style(MAUVE, "plus"),
    "Linear attention": Style(PINK, "triangle"),
    "RetNet": Style(RED, "cross"),
    "Lightning": Style(GREEN, "circle"),
    "Simple GLA": Style(TAN, "triangle"),
    "HGRN2": Style(VIOLET, "cross"),
    "GSA": Style(TEAL, "diamond"),
    "RWKV-4": Style(OLIVE, "down"),
    "RWKV-5": Style(ORANGE, "down"),
    "RWKV-6": Style(PLUM, "circle"),
    "Prefix linear attention": Style(BLUE, "square"),
    "Convolution": Style(STEEL, "plus"),
    "Gated convolution": Style(MAUVE, "square"),
    "Long convolution": Style(GREEN, "square"),
    "Implicit convolution": Style(ORANGE, "diamond"),
    "RWKV-4 channel mix": Style(PLUM, "cross"),
    "RWKV-7 channel mix": Style(PINK, "circle"),
}
"""No pair twice, and colours that share a marker differ most."""

COLUMN_INCHES, PAGE_INCHES = 3.3, 6.9
"""The width of a column of a paper, and of its page."""
TEXT_POINTS = 7
PAPER: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize"), TEXT_POINTS),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "figure.titlesize"), TEXT_POINTS),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width", "grid.linewidth"), 0.5),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), QUIET),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), "black"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.color": "0.9",
    "lines.linewidth": 1,
    "lines.markersize": 4,
    "axes.labelpad": 2,
    "axes.titlepad": 4,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "legend.handlelength": 1.5,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1,
    "legend.labelspacing": 0.3,
    "legend.borderpad": 0,
    "savefig.dpi": 300,
    "svg.hashsalt": "based_jax",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
"""Of matplotlib, for whatever is drawn."""


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return the style of each family; that of a single mixer is always the same."""
    found = set(names)
    known = {name: style for name, style in FAMILY_STYLES.items() if name in found}
    others = (style for style in _pairs() if style not in known.values())
    return known | dict(zip(sorted(found - known.keys()), others, strict=False))


def marked(colour: str, marker: str) -> dict[str, Any]:
    """Return matplotlib's options of a line's colour and markers."""
    return {"color": colour, "marker": MARKERS[marker], "ms": MARKER_POINTS[marker]}


def _pairs() -> Iterable[Style]:
    """Yield all pairs over and over, one of each colour before the second of any."""
    rounds = range(len(MARKERS))
    pairs = [Style(colour, list(MARKERS)[(i + j) % len(MARKERS)]) for j in rounds for i, colour in enumerate(COLOURS)]
    return itertools.cycle(pairs)

"""The picture of the rows: tokens/s of decoding against batch and against context, beside the rooflines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from based_jax.errors import UserError
from based_jax.pictures import paper, styles
from experiments.generation.results import BATCHES, CONTEXTS, ONE_BATCH, ONE_CONTEXT, Found

CURVES = {
    "based_1b": ("Based", styles.BLUE, "circle"),
    "based_1b_flush": ("Based, state every 16 tokens", styles.TEAL, "circle"),
    "attention_1b": ("attention", styles.GREEN, "plus"),
    "attention_1b_streaming": ("attention, 512 kept: streaming", styles.OLIVE, "square"),
    "attention_1b_h2o": ("attention, 512 kept: h2o", styles.ORANGE, "square"),
    "attention_1b_roco": ("attention, 512 kept: roco", styles.PINK, "square"),
    "mamba_1b": ("Mamba", styles.RED, "triangle"),
    "gated_deltanet_1b": ("Gated DeltaNet", styles.VIOLET, "diamond"),
    "hf:llama_1b": ("Llama, transformers", styles.STEEL, "cross"),
    "fla:gated_deltanet_1b": ("Gated DeltaNet, FLA", styles.TAN, "down"),
}
ROOFLINE_NAME = "roofline of each"
ROOFLINE: dict[str, Any] = {"ls": ":", "marker": "_", "ms": 6, "mew": 0.75, "lw": 0.75}
"""A bar at each size, so that one alone is seen."""
PANEL_INCHES = 2.4
SIDE_ROOM = 1.5
"""Times the first and the last size, of an axis."""


class Panel(NamedTuple):
    """What stands along an axis, and the rows of a model there."""

    label: str
    rows: dict[str, dict[int, dict]]

    @property
    def sizes(self) -> list[int]:
        """Those at which a model has a row."""
        return sorted({x for line in self.rows.values() for x in line})


def panels(found: Found) -> list[Panel]:
    """Return the rows against batch and against context; where neither is a curve, those against batch alone.

    Raises:
      UserError: there is no row.
    """
    by_batch = {name: {x: found.row(name, x, ONE_CONTEXT) for x in BATCHES} for name in CURVES}
    by_context = {name: {x: found.fullest(name, x) for x in CONTEXTS} for name in CURVES}
    both = [
        Panel(f"sequences ({ONE_CONTEXT:,} tokens of context)", _known(by_batch)),
        Panel(f"tokens of context ({ONE_BATCH} sequences, or the most that fit)", _known(by_context)),
    ]
    with_rows = [panel for panel in both if panel.rows]
    if not with_rows:
        raise UserError("There are no rows to draw: 'run' makes them.")
    return [panel for panel in with_rows if len(panel.sizes) > 1] or with_rows[:1]


def _known(rows: dict[str, dict[int, dict | None]]) -> dict[str, dict[int, dict]]:
    return {name: {x: row for x, row in line.items() if row} for name, line in rows.items() if any(line.values())}


@matplotlib.rc_context(styles.PAPER)
def draw(found: Found, path: Path) -> list[Path]:
    """Write the picture as PNG, SVG and PDF, and return the files.

    Raises:
      UserError: there is no row.
    """
    drawn = panels(found)
    names = [name for name in CURVES if any(name in panel.rows for panel in drawn)]
    entries = [CURVES[name][0] for name in names] + [ROOFLINE_NAME] * any(map(_has_rooflines, drawn))
    notes = [f"1.3B parameters, bf16 weights, random tokens; {' and '.join(found.devices())}"]
    width = styles.PAGE_INCHES if len(drawn) > 1 else styles.COLUMN_INCHES
    figure = paper.sheet(width, PANEL_INCHES, entries, notes)
    all_axes = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, drawn, strict=True):
        _draw_panel(axes, panel, names)
    if ROOFLINE_NAME in entries:
        all_axes[0].plot([], [], color="black", **ROOFLINE, label=ROOFLINE_NAME)
    all_axes[0].set_ylabel("tokens a second")
    paper.add_legend(figure, all_axes[0])
    return paper.save(figure, path)


def _has_rooflines(panel: Panel) -> bool:
    return any(row["roofline_tokens_per_second"] for line in panel.rows.values() for row in line.values())


def _draw_panel(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    for name in names:
        label, colour, marker = CURVES[name]
        line = panel.rows.get(name, {})
        speeds = [row["tokens_per_second"] for row in line.values()]
        rooflines = {x: row["roofline_tokens_per_second"] for x, row in line.items()}
        known = {x: y for x, y in rooflines.items() if y}
        axes.plot(list(known), list(known.values()), color=colour, **ROOFLINE)
        axes.plot(list(line), speeds, **styles.marked(colour, marker), label=label)
    axes.set(yscale="log", xlabel=panel.label)
    axes.set_xscale("log", base=2)
    axes.set_xlim(panel.sizes[0] / SIDE_ROOM, panel.sizes[-1] * SIDE_ROOM)
    axes.set_xticks(panel.sizes, [f"{x:,}" if x < 1024 else f"{x // 1024}K" for x in panel.sizes])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))

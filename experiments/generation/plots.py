"""The picture of the rows: tokens/s of decoding against batch and against context, beside the rooflines."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

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
PANEL_INCHES = 2.4


class Panel(NamedTuple):
    """What stands along an axis, and the rows of a model there."""

    label: str
    ticks: Sequence[int]
    rows: dict[str, dict[int, dict]]


def panels(found: Found) -> list[Panel]:
    """Return the rows against batch and against context."""
    by_batch = {name: {x: found.row(name, x, ONE_CONTEXT) for x in BATCHES} for name in CURVES}
    by_context = {name: {x: found.fullest(name, x) for x in CONTEXTS} for name in CURVES}
    return [
        Panel(f"sequences ({ONE_CONTEXT:,} tokens of context)", BATCHES, _known(by_batch)),
        Panel(f"tokens of context ({ONE_BATCH} sequences, or the most that fit)", CONTEXTS, _known(by_context)),
    ]


def _known(rows: dict[str, dict[int, dict | None]]) -> dict[str, dict[int, dict]]:
    return {name: {x: row for x, row in line.items() if row} for name, line in rows.items() if any(line.values())}


@matplotlib.rc_context(styles.PAPER)
def draw(found: Found, path: Path) -> list[Path]:
    """Write the picture as PNG, SVG and PDF, and return the files.

    Raises:
      UserError: there is no row.
    """
    both = panels(found)
    names = [name for name in CURVES if any(name in panel.rows for panel in both)]
    if not names:
        raise UserError("There are no rows to draw: 'run' makes them.")
    notes = [f"1.3B parameters, bf16 weights, random tokens; {' and '.join(found.devices())}"]
    entries = [*(CURVES[name][0] for name in names), ROOFLINE_NAME]
    figure = paper.sheet(styles.PAGE_INCHES, PANEL_INCHES, entries, notes)
    drawn = figure.subplots(1, 2, sharey=True)
    for axes, panel in zip(drawn, both, strict=True):
        _draw_panel(axes, panel, names)
    drawn[0].set_ylabel("tokens a second")
    paper.add_legend(figure, drawn[0])
    return paper.save(figure, path)


def _draw_panel(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    for name in names:
        label, colour, marker = CURVES[name]
        line = panel.rows.get(name, {})
        speeds = [row["tokens_per_second"] for row in line.values()]
        rooflines = {x: row["roofline_tokens_per_second"] for x, row in line.items()}
        axes.plot(list(line), speeds, **styles.marked(colour, marker), label=label)
        if None not in rooflines.values():
            axes.plot(list(rooflines), list(rooflines.values()), color=colour, ls=":")
    axes.plot([], [], color="black", ls=":", label=ROOFLINE_NAME)
    axes.set(yscale="log", xlabel=panel.label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(panel.ticks, [f"{x:,}" if x < 1024 else f"{x // 1024}K" for x in panel.ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))

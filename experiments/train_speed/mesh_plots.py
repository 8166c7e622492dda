"""The picture of weak scaling: tokens/s of a GPU among several over those of one alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

from based_jax.errors import UserError
from based_jax.pictures import paper, styles

ROW_INCHES, PANEL_INCHES = 0.17, 0.6
MEASURED, GOAL = "measured", "goal"


class Bar(NamedTuple):
    """A point's name, its GPUs, its efficiency, and its goal if it has one."""

    name: str
    devices: int
    efficiency: float
    goal: float | None


@matplotlib.rc_context(styles.PAPER)
def draw(bars: Sequence[Bar], devices: Iterable[str], path: Path) -> list[Path]:
    """Write a bar for each point as PNG, SVG and PDF, and return the files.

    Raises:
      UserError: there is no row.
    """
    if not bars:
        raise UserError("There are no rows of several GPUs to draw: 'run' makes them.")
    notes = [
        f"rows x tokens of each GPU, bf16, AdamW, random tokens; GPUs of one host; {' and '.join(sorted(devices))}"
    ]
    figure = paper.sheet(styles.PAGE_INCHES, PANEL_INCHES + ROW_INCHES * len(bars), [MEASURED, GOAL], notes)
    axes = figure.subplots()
    places = range(len(bars))
    drawn = axes.barh(places, [100 * bar.efficiency for bar in bars], color=styles.BLUE, label=MEASURED)
    axes.bar_label(drawn, fmt="%.1f", label_type="center", color="white")
    goals = {i: 100 * bar.goal for i, bar in enumerate(bars) if bar.goal is not None}
    axes.scatter(list(goals.values()), list(goals), marker="|", s=60, color=styles.RED, label=GOAL, zorder=3)
    axes.set_yticks(places, [f"{bar.name} {bar.devices}" for bar in bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("tokens a second of a GPU, % of those of one GPU alone")
    paper.add_legend(figure, axes)
    return paper.save(figure, path)

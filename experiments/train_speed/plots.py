"""The picture of the rows: tokens/s of each model, what it is to reach, and other libraries' models."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes

from based_jax.errors import UserError
from based_jax.pictures import paper, styles

ROW_INCHES, PANEL_INCHES = 0.17, 0.55
OURS, THEIRS, GOAL = "based_jax", "other libraries", "goal"


class Bar(NamedTuple):
    """A model's tokens/s, and its goal if it is one of ours."""

    name: str
    tokens_per_second: float
    goal: int | None


def bars(measured: Iterable[tuple], peers: Sequence[dict]) -> dict[str, list[Bar]]:
    """Return the bars by panel: models of 1.3B parameters, other libraries' too, and those of 360M."""
    panels: dict[str, list[Bar]] = {"1.3B": [], "360M": []}
    for point, row in measured:
        if row is not None:
            name = f"{point.name}, {point.rows} x {point.seq_len:,}"
            panel = "1.3B" if point.name.endswith("1b") else "360M"
            panels[panel].append(Bar(name, row["tokens_per_second"], point.goal))
    for row in peers:
        name = f"{row['config']}, {row['rows']} x {row['seq_len']:,}"
        panels["1.3B"].append(Bar(name, row["tokens_per_second"], None))
    return {title: found for title, found in panels.items() if found}


@matplotlib.rc_context(styles.PAPER)
def draw(panels: dict[str, list[Bar]], devices: Iterable[str], path: Path) -> list[Path]:
    """Write a bar for each model as PNG, SVG and PDF, and return the files.

    Raises:
      UserError: there is no row.
    """
    if not panels:
        raise UserError("There are no rows to draw: 'run' makes them.")
    heights = [PANEL_INCHES + ROW_INCHES * len(found) for found in panels.values()]
    notes = [f"bf16, AdamW, random tokens; rows x tokens of a step; {' and '.join(dict.fromkeys(devices))}"]
    figure = paper.sheet(styles.PAGE_INCHES, sum(heights), [OURS, THEIRS, GOAL], notes)
    columns = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, found) in zip(columns, panels.items(), strict=True):
        _draw_panel(axes, found)
        axes.set_title(title)
    columns[-1].set_xlabel("thousand tokens a second")
    paper.add_legend(figure, columns[0])
    return paper.save(figure, path)


def _draw_panel(axes: Axes, found: Sequence[Bar]) -> None:
    for label, colour, is_ours in ((OURS, styles.BLUE, True), (THEIRS, styles.STEEL, False)):
        chosen = {i: bar for i, bar in enumerate(found) if (bar.goal is not None) == is_ours}
        speeds = [bar.tokens_per_second / 1e3 for bar in chosen.values()]
        drawn = axes.barh(list(chosen), speeds, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.1f", label_type="center", color="white")
    goals = {i: bar.goal / 1e3 for i, bar in enumerate(found) if bar.goal is not None}
    axes.scatter(list(goals.values()), list(goals), marker="|", s=60, color=styles.RED, label=GOAL, zorder=3)
    axes.set_yticks(range(len(found)), [bar.name for bar in found])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)

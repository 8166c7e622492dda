"""A picture of what models recall: scores of documents side by side, and of made-up prompts against their length."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from based_jax.errors import UserError
from based_jax.evals.recall import Summary
from based_jax.evals.recall_tasks import TASKS, MadeUpTask
from based_jax.pictures import paper, styles
from based_jax.pictures.runs import run_form

COLUMNS, PANEL_INCHES, DOCUMENT_INCHES = 3, 1.55, 2.1
SPREAD = 0.5
"""Of the models beside each other, of the room of a task."""
NOTE = (
    "Mean score of each task's examples (F1 where its name says so, else the share of answers that are said), with the"
    " interval of 95 % over documents that are drawn again."
)


def draw(summaries: Sequence[Summary], path: str | os.PathLike) -> list[Path]:
    """Draw the scores of all models as PNG, SVG and PDF, and return the files.

    Raises:
      UserError: there are no rows, or the files cannot be written.
    """
    return paper.save(recall_figure(summaries), path)


@matplotlib.rc_context(styles.PAPER)
def recall_figure(summaries: Sequence[Summary]) -> Figure:
    """Return what `draw` draws."""
    if not summaries:
        raise UserError("There are no rows of recall to draw; `eval recall` writes them.")
    models = list(dict.fromkeys(x.model for x in summaries))
    made_up = list(dict.fromkeys(x.part.task for x in summaries if _is_made_up(x)))
    documents = [x for x in summaries if not _is_made_up(x)]
    lines = [DOCUMENT_INCHES] * bool(documents) + [PANEL_INCHES] * -(-len(made_up) // COLUMNS)
    figure = paper.sheet(styles.PAGE_INCHES, sum(lines), models, [NOTE])
    grid = figure.add_gridspec(len(lines), COLUMNS, height_ratios=lines)
    axes = [figure.add_subplot(grid[0, :])] if documents else []
    if documents:
        _draw_documents(axes[0], documents, models)
    for place, task in enumerate(made_up):
        line, column = divmod(place, COLUMNS)
        axes.append(figure.add_subplot(grid[line + bool(documents), column]))
        _draw_lengths(axes[-1], [x for x in summaries if x.part.task == task], models)
    for panel in axes:
        panel.set_ylim(-0.02, 1.02)
    for number, model in enumerate(models):
        axes[0].plot([], [], color=run_form(number)["color"], marker="o", ms=3, label=model)
    paper.add_legend(figure, axes[0])
    return figure


def _is_made_up(summary: Summary) -> bool:
    return isinstance(TASKS[summary.part.task], MadeUpTask)


def _draw_documents(axes: Axes, summaries: Sequence[Summary], models: Sequence[str]) -> None:
    """Draw a point with its interval for each model and task."""
    names = list(dict.fromkeys(_label(x) for x in summaries))
    for number, model in enumerate(models):
        found = [x for x in summaries if x.model == model]
        offset = SPREAD * (number / max(len(models) - 1, 1) - 0.5) * (len(models) > 1)
        _points(axes, [names.index(_label(x)) + offset for x in found], found, number, ls="")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_title("documents")


def _draw_lengths(axes: Axes, summaries: Sequence[Summary], models: Sequence[str]) -> None:
    """Draw a line for each model over the length of the prompt."""
    for number, model in enumerate(models):
        found = sorted((x for x in summaries if x.model == model), key=lambda x: x.part.length or 0)
        _points(axes, [x.part.length or 0 for x in found], found, number, ls="-")
    lengths = sorted({x.part.length or 0 for x in summaries})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_title(summaries[0].part.task)
    axes.set_xlabel("tokens")


def _points(axes: Axes, places: Sequence[float], found: Sequence[Summary], number: int, ls: str) -> None:
    means = [x.scores[x.metric] for x in found]
    values = np.array([mean.value for mean in means])
    errors = np.array([[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]])
    errors = np.maximum(errors, 0)
    axes.errorbar(places, values, errors, color=run_form(number)["color"], marker="o", ms=2.5, ls=ls, elinewidth=0.6)


def _label(summary: Summary) -> str:
    return summary.part.name + " (F1)" * (summary.metric == "f1")

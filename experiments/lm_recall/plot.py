"""Draw recall on real text against the bytes of a state: results/recall.png, .svg and .pdf."""

import argparse
from pathlib import Path

import matplotlib

from based_jax.errors import UserError
from based_jax.pictures import panels, paper, styles
from experiments import commands
from experiments.lm_recall import results, sweeps
from experiments.lm_recall.results import Model

FP32_BYTES = 4
PANELS = {
    "SQuAD, F1": ("squad_questions", 1),
    "extraction, share of answers said": ("extraction", 1),
    "a needle in essays (NIAH-2), 1x": ("niah_single_2", 1),
}
CAPTION = (
    "Small language models of 56 million parameters after the same tokens; fp32 bytes of all layers' states behind a"
    " prompt of the training length. States are equal but attention's: models stand side by side about their size."
    " Intervals of 95 % over documents."
)
STEP = 1.06
"""From one model to its neighbour of the same size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments."""


def run(args: argparse.Namespace) -> int:
    """Draw the picture."""
    return commands.drawn(lambda: draw(results.read(), results.PICTURE))


@matplotlib.rc_context(styles.PAPER)
def draw(models: list[Model], path: Path) -> list[Path]:
    """Draw the models; UserError where there are none."""
    if not models:
        raise UserError("The store has no finished run to draw; `run` makes them.")
    looks = styles.styles(model.title for model in models)
    figure = paper.sheet(styles.PAGE_INCHES, 2.3, [model.title for model in models], [CAPTION])
    for axes, (title, (task, times)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        sizes = _spread(models)
        for model, size in zip(models, sizes, strict=True):
            if (found := model.recall(task, times * sweeps.SEQ_LEN)) is None:
                continue
            value, low, high = found
            style = looks[model.title]
            ends = [[max(value - low, 0)], [max(high - value, 0)]]
            axes.errorbar([size], [value], ends, color=style.colour, lw=0.75, capsize=1.5)
            axes.plot([size], [value], ls="", label=model.title, **styles.marked(style.colour, style.marker))
        axes.set_title(title)
        axes.set_xlabel("state of a sequence")
        panels.byte_axis(axes, sizes, 1.8)
        ticks = sorted(_alike(models))
        axes.set_xticks(ticks, [panels.byte_text(size) for size in ticks])
        axes.set_ylim(bottom=0)
    paper.add_legend(figure, figure.axes[0])
    return paper.save(figure, path)


def _alike(models: list[Model]) -> dict[float, list[int]]:
    """Return the places of the models by their bytes, those within 1 % under the first one's."""
    found: dict[float, list[int]] = {}
    for place, model in enumerate(models):
        size = FP32_BYTES * model.mean("elements_by_length", str(sweeps.SEQ_LEN))
        found.setdefault(next((known for known in found if abs(known / size - 1) < 0.01), size), []).append(place)
    return found


def _spread(models: list[Model]) -> list[float]:
    """Return the bytes of each model, those of one size moved apart about it, so that all are seen."""
    moved = {
        place: size * STEP ** (number - (len(places) - 1) / 2)
        for size, places in _alike(models).items()
        for number, place in enumerate(places)
    }
    return [moved[place] for place in range(len(models))]

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
    " prompt of the training length. States are equal but attention's. Intervals of 95 % over documents."
)


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
        axes.set_xlabel("state of a sequence, the models side by side")
        panels.byte_axis(axes, sizes, 1.8)
        axes.set_ylim(bottom=0)
    paper.add_legend(figure, figure.axes[0])
    return paper.save(figure, path)


def _spread(models: list[Model]) -> list[float]:
    """Return the bytes of each model, those of one size moved apart by 4 % each, so that all are seen."""
    sizes = [FP32_BYTES * model.mean("elements_by_length", str(sweeps.SEQ_LEN)) for model in models]
    seen: dict[float, int] = {}
    places = []
    for size in sizes:
        near = next((known for known in seen if abs(known / size - 1) < 0.01), size)
        seen[near] = seen.get(near, 0) + 1
        places.append(size * 1.04 ** (seen[near] - 1))
    return places

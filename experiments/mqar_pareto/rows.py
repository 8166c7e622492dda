"""The committed rows of the sweeps, those of one recipe of initial values at a time: one store holds several."""

import argparse
from pathlib import Path

from based_jax.nn.init_recipes import INIT_RECIPES
from based_jax.store import Store
from experiments.mqar_pareto.throughput import RESULTS

SHOWN_RECIPE = "reference"
"""Of the initial values of the models whose rows the README shows, but where it sets those of zoology beside them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the rows lie, and which of them are meant."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the stores (default: the committed)")
    parser.add_argument(
        "--init-recipe",
        choices=sorted(INIT_RECIPES),
        default=SHOWN_RECIPE,
        help=f"the rows of models that start by this recipe (default: {SHOWN_RECIPE})",
    )


def of_recipe(path: Path, init_recipe: str) -> list[dict]:
    """Return the rows of a store, or of one file of it, whose models start by that recipe.

    A row that names none is older than the choice, and of the recipe "reference".
    """
    return [row for row in Store(path).rows() if _init_recipe(row) == init_recipe]


def _init_recipe(row: dict) -> str:
    return row["config"].get("model", {}).get("init_recipe", "reference")

"""The README's pictures, from the rows in results/: the frontier over the published points, feature maps, the ablation.

Each is there as PNG, SVG and PDF, the frontier as a page to explore as well. The published points are drawn where
all rows have the tests of their protocol.
"""

import argparse
from pathlib import Path

from based_jax.errors import UserError
from based_jax.pictures import figures, page
from experiments.mqar_pareto import rows
from experiments.mqar_pareto.published import comparable
from experiments.mqar_pareto.throughput import RESULTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    rows.add_arguments(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures (default: the committed)")


def run(args: argparse.Namespace) -> int:
    """Draw the pictures of the stores that are there.

    Raises:
      UserError: there are no rows.
    """
    stores = (args.results / name for name in ("figure2", "figure3", "ablation"))
    frontier, maps, parts = (rows.of_recipe(store, args.init_recipe) for store in stores)
    drawn: list[Path] = []
    if frontier:
        published = comparable(frontier)
        drawn += figures.frontier(frontier, args.out / "frontier", published=published)
        drawn.append(page.write(frontier, args.out / "frontier.html", title=page.TITLE, published=published))
    if maps:
        drawn += figures.figure3(maps, args.out / "figure3")
    if parts:
        drawn += figures.ablation(parts, args.out / "ablation")
    if not drawn:
        raise UserError(f"'{args.results}' has no rows of the recipe '{args.init_recipe}' to draw.")
    print(f"Drawn: {', '.join(map(str, drawn))}.")
    return 0

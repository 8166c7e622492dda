"""The README's pictures, from the rows in results/: the frontier over the published points, feature maps, the ablation.

The frontier is there as PNG, SVG and a page to explore, the others as PNG and SVG. The published points are drawn where
all rows have the tests of their protocol.
"""

import argparse
from pathlib import Path

from based_jax.pictures import figures, page
from based_jax.store import Store
from experiments.mqar_pareto.published import comparable
from experiments.mqar_pareto.throughput import RESULTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the stores (default: the committed)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures (default: the committed)")


def run(args: argparse.Namespace) -> int:
    """Draw the pictures of the stores that are there."""
    frontier, maps, parts = (Store(args.results / name).rows() for name in ("figure2", "figure3", "ablation"))
    drawn: list[Path] = []
    if frontier:
        published = comparable(frontier)
        drawn += figures.frontier(frontier, args.out / "frontier", published=published)
        path = args.out / "frontier.html"
        drawn.append(page.write(frontier, path, title=figures.FRONTIER_TITLE, published=published))
    if maps:
        drawn += figures.figure3(maps, args.out / "figure3")
    if parts:
        drawn += figures.ablation(parts, args.out / "ablation")
    print(f"Drawn: {', '.join(map(str, drawn))}.")
    return 0

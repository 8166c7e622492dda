"""Draw the curves of training runs: loss, evaluation, learning rate and throughput, as files and as a page.

examples:
  python -m based_jax plot runs/text --out=runs/pictures
  python -m based_jax plot runs/taylor runs/window runs/mamba --out=runs/pictures --title="Three mixers"
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, one that goes on too")
    parser.add_argument("--out", required=True, help="folder of runs.png, .svg, .pdf and runs.html")
    parser.add_argument("--title", help="of the page (default: Training runs)")


def run(args: argparse.Namespace) -> None:
    """Read all runs, then write the pictures and the page."""
    from based_jax.folders import local_path
    from based_jax.pictures import curves, runs

    out = local_path(args.out, "--out")
    found = curves.read_runs(args.runs)
    files = runs.draw(found, out / "runs")
    files.append(runs.page(found, out / "runs.html", title=args.title or runs.TITLE))
    print(f"Drawn: {', '.join(map(str, files))}.")

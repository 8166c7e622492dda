"""Tell what TPU kernels and XLA's forms cost, by the schedules of libtpu: no TPU is needed, and nothing is timed.

examples:
  python -m based_jax bench static --topology=v5e
  python -m based_jax bench static --topology v5e v6e --only=Taylor --baseline=experiments/tpu/results/static.jsonl
"""

import argparse
from pathlib import Path

from based_jax.commands.parser import out_file

CHIPS = ("v5e", "v5p", "v6e", "v7x")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments."""
    parser.add_argument(
        "--topology", nargs="+", default=["v5e"], choices=CHIPS, help=f"of {' '.join(CHIPS)} (default: v5e)"
    )
    parser.add_argument("--only", default="", help="points whose name, as it is printed, contains this")
    parser.add_argument("--out", type=out_file, help="JSON lines; rows of the same points are replaced, others stay")
    parser.add_argument("--baseline", type=Path, help="rows; a kernel of 10 %% more bundles ends in exit code 1")


def run(args: argparse.Namespace) -> int:
    """Print a line per point as it is compiled; return 1 if a kernel has become worse."""
    from based_jax.bench.static import points, schedules

    names = points.chosen(args.topology, args.only)
    kept = [] if args.baseline is None else points.read(args.baseline)
    dump, worse = schedules.dump_into_a_folder(), []
    for name in names:
        row = points.row_of(name, dump, is_kept=args.out is not None)
        print(points.line(row), flush=True)
        points.keep(row, args.out)
        if regressed := points.regression(row, kept):
            worse.append(regressed)
    for what in worse:
        print(f"WORSE {what}")
    return 1 if worse else 0

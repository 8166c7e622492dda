"""Tell where the time of a call goes: by kernel, and within each kernel from Nsight Compute.

examples:
  python -m based_jax bench profile --ops taylor_attention --shapes 8x16x2048
"""

import argparse
import itertools
import os

from based_jax.commands.bench.kernels import parse_names, parse_shape
from based_jax.commands.parser import out_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments."""
    parser.add_argument("--out", type=out_file, help="JSON lines; replaced")
    parser.add_argument("--ops", nargs="+", default=["taylor_attention"], help="operations, or 'all'")
    parser.add_argument("--shapes", nargs="+", default=[], help="BxHxT (default: the table's and the longest)")
    parser.add_argument(
        "--impls", nargs="+", default=[], help="implementations (default: those that run kernels of our own)"
    )
    parser.add_argument("--no-ncu", action="store_true", help="only JAX's profiler")
    parser.add_argument(
        "--raw", type=out_file, help="keep all that Nsight Compute says of each launch in this file (CSV)"
    )
    parser.add_argument(
        "--inner", type=out_file, help="only run each call once, and write to this file what it launches"
    )


def run(args: argparse.Namespace) -> None:
    """Print and write a row per call, and one per kernel launch in it."""
    from based_jax.bench import profile, rows

    os.environ |= profile.NO_PREALLOCATION
    shapes = [parse_shape(text) for text in args.shapes] or profile.PROFILED_SHAPES
    selection = profile.TimedSelection(parse_names(args.ops), shapes, args.impls)
    if args.inner:
        profile.launch(selection, args.inner)
        return
    if not args.no_ncu:
        profile.check_tool()
    counted = [] if args.no_ncu else profile.counters(selection, args.raw)
    with rows.replaced(args.out) as write:
        for row in itertools.chain(profile.timelines(selection), counted):
            print(profile.line(row), flush=True)
            write(row | rows.facts())

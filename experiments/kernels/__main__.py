"""Checks, times and pictures of the kernels; `python -m based_jax bench kernels` writes the times.

On a GPU: check, sanitize, profile, train. From the rows in results/: plot, table.
"""

import argparse
import os
import sys

from based_jax.errors import UserError
from experiments.kernels import check, plots, profiler, sanitizer, tables, training

COMMANDS = {
    "check": check,
    "sanitize": sanitizer,
    "profile": profiler,
    "train": training,
    "plot": plots,
    "table": tables,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # JAX reads it when it first meets the GPU: calls past 2^31 elements need more than the usual three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    parser = argparse.ArgumentParser(prog="python -m experiments.kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip()
        options = {"description": summary, "formatter_class": argparse.RawDescriptionHelpFormatter}
        added = commands.add_parser(name, help=summary.splitlines()[0], **options)
        module.add_arguments(added)
        added.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

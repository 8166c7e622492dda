"""Tables and pictures of the rows in results/, and the training run; `python -m based_jax bench` makes the others.

On a GPU: train. Anywhere: plot, table.
"""

import sys

from experiments import commands
from experiments.kernels import plots, tables, training

COMMANDS = {
    "train": training,
    "plot": plots,
    "table": tables,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return commands.run_module("kernels", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())

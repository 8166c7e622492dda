"""Small language models with equal states on real text: prepare, table, plot."""

import sys

from experiments import commands
from experiments.lm_recall import plot, prepare, table

MODULES = {"prepare": prepare, "table": table, "plot": plot}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return commands.run_module("lm_recall", __doc__, MODULES, argv)


if __name__ == "__main__":
    sys.exit(main())

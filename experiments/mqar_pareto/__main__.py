"""The recall-memory frontier; the sweeps themselves run by `python -m based_jax sweep run` (see README.md)."""

import sys

from experiments import commands
from experiments.mqar_pareto import pictures, profile, tables, throughput

COMMANDS = {"throughput": throughput, "profile": profile, "tables": tables, "pictures": pictures}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return commands.run_module("mqar_pareto", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())

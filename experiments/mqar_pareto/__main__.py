"""The recall-memory frontier; the sweeps themselves run by `python -m based_jax sweep run` (see README.md)."""

import argparse
import sys

from based_jax.errors import UserError
from experiments.mqar_pareto import pictures, profile, tables, throughput

COMMANDS = {"throughput": throughput, "profile": profile, "tables": tables, "pictures": pictures}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.mqar_pareto", description=__doc__)
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

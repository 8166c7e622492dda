"""The command line: `python -m based_jax <command> --help`."""

import argparse
import logging
import sys
from typing import NoReturn

from based_jax.commands import bench, convert, describe, eval, generate, plot, sweep, train
from based_jax.errors import UserError

COMMANDS = {
    "train": train,
    "eval": eval,
    "plot": plot,
    "generate": generate,
    "convert": convert,
    "describe": describe,
    "bench": bench,
    "sweep": sweep,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code, or 2 after one sentence on what was wrong with the input."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("based_jax").setLevel(logging.INFO)
    try:
        args, overrides = _parser().parse_known_args(argv)
        if overrides and not getattr(args, "takes_overrides", False):
            raise UserError(f"Unknown argument '{overrides[0]}' for '{args.command}'; see --help.")
        args.overrides = overrides
        return COMMANDS[args.command].run(args) or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments as all other bad input: one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong."""
        raise UserError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m based_jax", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip()
        module.add_arguments(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    return parser


if __name__ == "__main__":
    sys.exit(main())

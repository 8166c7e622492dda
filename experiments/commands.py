"""The commands of a folder: run, table, plot, where a benchmark appends the rows; or one of each of its modules."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from based_jax.errors import UserError


def main(
    doc: str | None, run: Callable[[str, bool], int], write_tables: Callable[[], object], draw: Callable[[], list[Path]]
) -> int:
    """Run one command and return its exit code.

    Args:
      doc: what `--help` says.
      run: times what has a text in its name, and the other libraries' models if asked to; returns an exit code.
      write_tables: writes the page's tables.
      draw: draws the picture, and returns its files.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "plot"))
    parser.add_argument("--only", default="", help="of the models those whose name has this text")
    parser.add_argument("--peers", action="store_true", help="time the other libraries' models as well")
    args = parser.parse_args()
    if args.command == "run":
        return run(args.only, args.peers)
    if args.command == "table":
        write_tables()
        return 0
    return drawn(draw)


def drawn(draw: Callable[[], list[Path]]) -> int:
    """Draw a picture, say in which files it is, and return an exit code."""
    return exit_code(lambda: print(f"Drawn: {', '.join(map(str, draw()))}."))


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code, 2 where it refuses something, which is told."""
    try:
        return command() or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def run_module(folder: str, doc: str | None, modules: Mapping[str, ModuleType], argv: list[str] | None) -> int:
    """Run the command of one of these modules, which have `add_arguments` and `run`, and return its exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{folder}", description=doc)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in modules.items():
        summary = (module.__doc__ or "").strip()
        options = {"description": summary, "formatter_class": argparse.RawDescriptionHelpFormatter}
        added = commands.add_parser(name, help=summary.splitlines()[0], **options)
        module.add_arguments(added)
        added.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return exit_code(lambda: args.run(args))

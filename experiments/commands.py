"""The commands of a folder whose page is made from rows that a benchmark appends: run, table, plot."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

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
    try:
        drawn = draw()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"Drawn: {', '.join(map(str, drawn))}.")
    return 0

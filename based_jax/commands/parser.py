"""The parser of a command: wrong arguments are one sentence, and a command's docstring is its help."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from based_jax.errors import UserError

MODULE_CALL = "python -m based_jax"


class CommandParser(argparse.ArgumentParser):
    """Reports wrong arguments as all other bad input, and writes help as it stands in the source.

    Attributes:
      details: makes what `--help` ends with, where that takes time; None for nothing.
    """

    details: Callable[[], str] | None = None

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong."""
        raise UserError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")

    def format_help(self) -> str:
        """Return the help, with its details."""
        return super().format_help() + ("" if self.details is None else f"\n{self.details()}")


def add_command(commands: Any, name: str, doc: str | None) -> CommandParser:
    """Add a command to subparsers: the first paragraph of `doc` is what it does, the rest its examples."""
    summary, _, rest = inspect.cleandoc(doc or "").partition("\n\n")
    summary = " ".join(summary.split())
    examples = rest.replace(MODULE_CALL, program_name())
    return commands.add_parser(name, help=summary, description=summary, epilog=examples)


def program_name() -> str:
    """Return how the program was called: as a module, or by the name of its script."""
    name = Path(sys.argv[0]).name
    return name if name == "based_jax" else MODULE_CALL

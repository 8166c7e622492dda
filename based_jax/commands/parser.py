"""The parser of a command: wrong arguments are one sentence, and a command's docstring is its help."""

import argparse
import errno
import inspect
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from based_jax.errors import UserError
from based_jax.folders import local_path, reason

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


def seconds(text: str) -> float:
    """Return a time to wait that an argument gives; what is none is refused by the parser."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text}, which is no time to wait: seconds, above 0")
    return value


def out_file(text: str) -> Path:
    """Return the path of a file to write that an argument gives; where none can be written, the parser refuses it."""
    try:
        path = local_path(text, "it")
        if path.is_dir():
            raise UserError(f"'{path}' is a folder; it is a file.")
        there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        if there != path and not there.is_dir():
            raise UserError(f"'{path}' cannot be a file: '{there}' is no folder.")
        if not os.access(there, os.W_OK):
            raise UserError(f"'{path}' cannot be written: {os.strerror(errno.EACCES)}.")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"'{text}' cannot be written: {reason(error)}") from None
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removesuffix(".")) from None
    return path

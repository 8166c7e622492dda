"""The argument of commands that keep their compiled programs on the disk."""

import argparse
import logging

from based_jax.commands.parser import CommandParser

log = logging.getLogger(__name__)


def add_compiled_argument(parser: CommandParser) -> None:
    """Declare where compiled programs are kept."""
    parser.add_argument(
        "--compiled",
        metavar="DIR",
        help="where compiled programs are kept for the next time, or none"
        " (default: $BASED_JAX_COMPILED, else ~/.cache/based_jax/compiled)",
    )


def keep_programs(args: argparse.Namespace) -> None:
    """Keep what a command compiles, if it is one that does, and say where."""
    if "compiled" not in args:
        return
    from based_jax import compilation

    known = compilation.kept_in()
    folder = compilation.keep(args.compiled)
    if folder is not None and known is None:
        log.info("Compiled programs are kept in '%s' (--compiled=none keeps none).", folder)

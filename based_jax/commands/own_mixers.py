"""Mixers from outside the package, of which a run's config.json has the names and a command is given the classes."""

import argparse


def add_mixer_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the classes of a run's layers that the package lacks."""
    parser.add_argument(
        "--mixer",
        action="append",
        default=[],
        metavar="FILE.py:CLASS",
        help="of the run's layers, a mixer that the package lacks; may be given several times",
    )


def own_mixers(args: argparse.Namespace) -> list[type]:
    """Return the classes that a command is given.

    Raises:
      UserError: a file is missing or fails, or has no such class.
    """
    from based_jax import config as configs

    return [configs.class_in_file(spec) for spec in args.mixer]

"""Hold a mixer to the contracts, train it in a small sweep, and draw its point among those of the package's mixers.

examples:
  python -m based_jax frontier my_mixer.py:MyMixer
  python -m based_jax frontier my_mixer.py:MyMixer --options "{'key_dim': 8}" "{'key_dim': 32}" --out=runs/mine
"""

import argparse
import ast
import sys
from collections.abc import Mapping
from typing import Any

from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.parser import CommandParser
from based_jax.errors import UserError
from based_jax.revision import command


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("mixer", help="path/to/file.py:Class, or the name of a mixer of the package")
    parser.add_argument(
        "--options",
        nargs="+",
        default=["{}"],
        help="dicts of options of its Config, a point each; the first is held to the contracts (default: {})",
    )
    parser.add_argument("--out", default="runs/frontier", help="folder of rows and pictures (default: runs/frontier)")
    add_compiled_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Do all three, and say where the mixer stands; return 1 if it could not be trained."""
    from based_jax.folders import local_path
    from based_jax.newcomer import frontier
    from based_jax.sweep.schedule import SweepFailedError

    mixer, several = _mixer(args.mixer), [_options(text) for text in args.options]
    out = local_path(args.out, "--out")
    frontier.sweep_of(mixer, several).trials()  # what is impossible is told before anything takes its time
    frontier.check_contracts(mixer, several[0])
    try:
        found = frontier.place(mixer, several, out=out, command=command())
    except SweepFailedError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for point in found.points:
        size = point.state_bytes(convolution=False)
        print(f"{point.family}, {point.label}: accuracy {point.median:.3f} with {size:,} bytes of state.")
    print(f"Drawn: {', '.join(map(str, found.pictures))}.")
    return 0


def _mixer(text: str) -> str | type:
    from based_jax import config as configs
    from based_jax.errors import unknown
    from based_jax.nn.mixers import MIXERS

    if ":" not in text and not text.endswith(".py"):
        if text not in MIXERS:
            raise unknown("mixer", text, [*MIXERS, "path/to/file.py:Class"])
        return text
    return configs.class_in_file(text)


def _options(text: str) -> Mapping[str, Any]:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--options has '{text}'; it is a dict of options, such as \"{{'num_heads': 2}}\".")
    return found

"""Write the skeleton of a mixer, which keeps all contracts as it stands: into the checkout, or into a file of its own.

examples:
  python -m based_jax new-mixer my_mixer
  python -m based_jax new-mixer my_mixer --file=my_mixer.py
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", help="what layer lists call it, such as my_mixer")
    parser.add_argument("--file", help="a new file for the mixer alone (default: one more mixer of this checkout)")


def run(args: argparse.Namespace) -> None:
    """Write the files, and say what comes next."""
    from based_jax.newcomer import skeleton

    if args.file is not None:
        path = skeleton.write_file(args.name, args.file)
        print(f"Written: {path}.\nNext: python -m based_jax frontier {path}:{skeleton.class_name(args.name)}")
        return
    new, *changed = skeleton.write_into(args.name, Path())
    print(f"Written: {new}, and a line each in {', '.join(map(str, changed))}.")
    print(f"Next: python -m pytest tests/test_contracts.py -k '[{args.name}] or -{args.name}]'")
    print(
        "The suite asks more of a mixer that is merged: a colour in pictures/styles.py, and in"
        " tests/nn/assets/zoology_init.txt what its parameters start with."
    )

"""Say what a file holds that `generate --save-state` wrote: what a model keeps of a text, layer by layer.

examples:
  python -m based_jax state inspect was.safetensors
"""

import argparse

from based_jax.commands.parser import add_command

INSPECT = """Print a row for each layer: its mixer, elements, bytes and norm.

examples:
  python -m based_jax state inspect was.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the one task."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="task")
    task = add_command(tasks, "inspect", INSPECT)
    task.add_argument("file", help="that of a state")


def run(args: argparse.Namespace) -> None:
    """Print the table, and what the state is of."""
    import pandas as pd

    from based_jax.generate.state import State, inspect

    state = State.load(args.file)
    print(pd.DataFrame(inspect(state)).to_string(index=False, float_format="{:.6g}".format))
    print(f"\nTokens read: {state.length:,}. Bytes: {state.nbytes:,}. Model: {state.model}.")

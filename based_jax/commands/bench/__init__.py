"""Time, check and profile single operations, whole training steps and the packing of data on the device at hand.

examples:
  python -m based_jax bench kernels --peers
  python -m based_jax bench check
  python -m based_jax bench train --config=configs/based.py:360m
"""

import argparse

from based_jax.commands.bench import check, data, kernels, profile, sanitize, train
from based_jax.commands.parser import add_command

TASKS = {"kernels": kernels, "check": check, "sanitize": sanitize, "profile": profile, "train": train, "data": data}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of each task."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="task")
    for name, module in TASKS.items():
        module.add_arguments(add_command(tasks, name, module.__doc__))


def run(args: argparse.Namespace) -> int | None:
    """Run one task and return its exit code."""
    return TASKS[args.task].run(args)

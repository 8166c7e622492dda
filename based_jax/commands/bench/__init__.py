"""Time, check and profile single operations, training steps, generation and the packing of data on the device at hand.

examples:
  python -m based_jax bench kernels --peers
  python -m based_jax bench check
  python -m based_jax bench train --config=configs/based.py:360m
"""

import argparse

from based_jax.commands.bench import check, data, generate, kernels, profile, sanitize, serve, static, train
from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.parser import add_command

TASKS = {
    "kernels": kernels,
    "check": check,
    "sanitize": sanitize,
    "profile": profile,
    "static": static,
    "train": train,
    "generate": generate,
    "serve": serve,
    "data": data,
}
COMPILING = (kernels, profile, train, generate, serve)
"""Tasks that keep what they compile; `check` and `sanitize` make their kernels anew."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of each task."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="task")
    for name, module in TASKS.items():
        task = add_command(tasks, name, module.__doc__)
        module.add_arguments(task)
        if module in COMPILING:
            add_compiled_argument(task)


def run(args: argparse.Namespace) -> int | None:
    """Run one task and return its exit code."""
    return TASKS[args.task].run(args)

"""Time, check and profile single operations and whole training steps on the device at hand."""

import argparse

from based_jax.commands.bench import check, kernels, profile, sanitize, train

TASKS = {"kernels": kernels, "check": check, "sanitize": sanitize, "profile": profile, "train": train}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of each task."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="task")
    for name, module in TASKS.items():
        summary = (module.__doc__ or "").strip()
        module.add_arguments(tasks.add_parser(name, help=summary, description=summary, allow_abbrev=False))


def run(args: argparse.Namespace) -> int | None:
    """Run one task and return its exit code."""
    return TASKS[args.task].run(args)

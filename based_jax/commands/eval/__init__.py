"""Evaluate a trained run on its own data (perplexity and accuracy), or any model on tasks.

examples:
  python -m based_jax eval --workdir=runs/text
  python -m based_jax eval --workdir=runs/text --step=1000
  python -m based_jax eval recall --model=runs/text --tasks=extraction,niah_single_1 --out=runs/recall
"""

import argparse
from typing import Any

from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.eval import choices, lm_eval, perplexity, plot, recall
from based_jax.commands.eval import run as own_data
from based_jax.commands.parser import CommandParser, add_command
from based_jax.errors import UserError

TASKS = {"recall": recall, "choices": choices, "perplexity": perplexity, "lm_eval": lm_eval, "plot": plot}
COMPILING = (recall, choices, perplexity)


def add_arguments(parser: CommandParser) -> None:
    """Declare the arguments of an evaluation on a run's own data, and of each task."""
    own_data.add_arguments(parser)
    tasks = parser.add_subparsers(dest="task", metavar="task", action=_TaskAction)
    for name, module in TASKS.items():
        task = add_command(tasks, name, module.__doc__)
        module.add_arguments(task)
        if module in COMPILING:
            add_compiled_argument(task)


def run(args: argparse.Namespace) -> int | None:
    """Run one task, or else the evaluation on a run's own data."""
    return (own_data if args.task is None else TASKS[args.task]).run(args)


class _TaskAction(argparse._SubParsersAction):
    """Refuses what is said of a run's own data before a task, which has its own arguments behind its name."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        for action in parser._actions:
            given = getattr(namespace, action.dest, action.default)
            if action.option_strings and given != action.default:
                option = action.option_strings[-1]
                raise UserError(
                    f"{option} is of a run's own data, and '{values[0]}' is a task; what a task takes stands behind its"
                    f" name: see eval {values[0]} --help."
                )
        super().__call__(parser, namespace, values, option_string)

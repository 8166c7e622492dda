"""Score a model on LAMBADA, ARC, PIQA, HellaSwag and WinoGrande by likelihood, as lm-eval does, without it.

examples:
  python -m based_jax eval choices --model=runs/text --tasks=lambada,arc_easy
  python -m based_jax eval choices --model=runs/text --tasks=piqa --data=piqa=sets/piqa.jsonl.xz --limit=500
"""

import argparse

from based_jax.commands.eval.sources import add_data_argument, sources_of
from based_jax.commands.parser import CommandParser
from based_jax.commands.text_models import add_model_folder_arguments, load_model_folder
from based_jax.errors import UserError, unknown


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    add_model_folder_arguments(parser)
    parser.add_argument("--tasks", required=True, metavar="A,B", help="names; an unknown one lists them all")
    add_data_argument(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first rows of a task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows of --max-length (default: 8)")
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="tokens read (default: 2048)")


def run(args: argparse.Namespace) -> None:
    """Print the metrics of each task, with their intervals of 95 %."""
    from based_jax.evals import choices
    from based_jax.evals.likelihood import Judge

    tasks = args.tasks.split(",")
    for name in tasks:
        if name not in choices.TASKS:
            raise unknown("task", name, choices.TASKS)
    numbers = {"limit": args.limit, "batch-size": args.batch_size, "max-length": args.max_length}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it is at least 1.")
    sources = sources_of(args.data, choices.TASKS, tasks)
    asked = {name: choices.choices_of(name, sources.get(name), args.limit) for name in tasks}
    model, tokenizer = load_model_folder(args)
    judge = Judge(model, args.batch_size * args.max_length)
    for name, rows in asked.items():
        found = choices.likelihoods_of(judge, tokenizer, rows, args.max_length)
        for metric, value in choices.scores_of(rows, found).items():
            shown = f"{value:.3f}" if isinstance(value, float) else str(value)
            print(f"{name:16} {metric:12} {shown:24} {len(rows):,} rows")

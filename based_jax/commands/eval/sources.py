"""The argument that gives tasks other rows than their own."""

from collections.abc import Collection, Sequence

from based_jax.commands.parser import CommandParser
from based_jax.errors import UserError, unknown


def add_data_argument(parser: CommandParser) -> None:
    """Declare sources of rows."""
    parser.add_argument(
        "--data", action="append", default=[], metavar="TASK=SOURCE", help="a file, a folder or hub:NAME of a task"
    )


def sources_of(words: Sequence[str], tasks: Collection[str]) -> dict[str, str]:
    """Return the source of each task that is given one; UserError for what is none of the tasks that have rows."""
    found = dict(word.partition("=")[::2] for word in words)
    for task, source in found.items():
        if task not in tasks:
            raise unknown("set", task, tasks)
        if not source:
            raise UserError(f"--data is '{task}'; it is TASK=SOURCE, such as {task}=rows.jsonl.")
    return found

"""The argument that gives tasks other rows than their own."""

from collections.abc import Collection, Sequence

from based_jax.commands.parser import CommandParser
from based_jax.errors import UserError, unknown


def add_data_argument(parser: CommandParser) -> None:
    """Declare sources of rows."""
    parser.add_argument(
        "--data", action="append", default=[], metavar="TASK=SOURCE", help="a file, a folder or hub:NAME of a task"
    )


def sources_of(words: Sequence[str], tasks: Collection[str], asked: Collection[str]) -> dict[str, str]:
    """Return the source of each task that is given one.

    Raises:
      UserError: a task is none of those that have rows, is not asked, or is given two sources.
    """
    found: dict[str, str] = {}
    for task, _, source in (word.partition("=") for word in words):
        if task not in tasks:
            raise unknown("set", task, tasks)
        if not source:
            raise UserError(f"--data is '{task}'; it is TASK=SOURCE, such as {task}=rows.jsonl.")
        if task not in asked:
            raise UserError(f"--data has rows of '{task}', which is none of --tasks: {', '.join(asked)}.")
        if task in found:
            raise UserError(f"--data has '{task}' twice; a task has one source, a file or a folder.")
        found[task] = source
    return found

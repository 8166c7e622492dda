"""Based and the sequence mixers it is compared with: train, evaluate, generate, measure, compile, sweep.

examples:
  python -m based_jax train --help
  python -m based_jax train --config=configs/mqar_tiny.py:taylor_8 --workdir=runs/mqar
  python -m based_jax describe --d-model=512
"""

import errno
import io
import logging
import os
import select
import sys

from based_jax import __version__
from based_jax.commands import (
    aot,
    bench,
    describe,
    eval,
    export,
    frontier,
    generate,
    inside,
    interrupts,
    new_mixer,
    plot,
    prepare,
    serve,
    state,
    sweep,
    train,
)
from based_jax.commands.compiled import keep_programs
from based_jax.commands.distributed import together
from based_jax.commands.parser import MODULE_CALL, CommandParser, add_command, program_name
from based_jax.errors import UserError
from based_jax.folders import reason

COMMANDS = {
    "prepare": prepare,
    "train": train,
    "eval": eval,
    "plot": plot,
    "generate": generate,
    "serve": serve,
    "state": state,
    "export": export,
    "describe": describe,
    "aot": aot,
    "bench": bench,
    "sweep": sweep,
    "new-mixer": new_mixer,
    "frontier": frontier,
    "inside": inside,
}
WRONG_INPUT, OUT_OF_MEMORY, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141
"""Exit codes; the last two are what shells report of a program that SIGINT or SIGPIPE ended."""
FULL_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""Of standard output: what else a command writes is told where it is written."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code, or another one after one sentence on what was wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("based_jax").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: not every terminal has every letter
    try:
        with interrupts.stopped_by_signals():
            code = _run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
        return code
    except UserError as error:
        print(f"Error: {' '.join(str(error).splitlines())}", file=sys.stderr)  # what a user typed may have lines
        _drop_what_output_refuses()
        return WRONG_INPUT
    except KeyboardInterrupt as error:
        print(str(error) or "Stopped by Ctrl-C.", file=sys.stderr)
        interrupts.clean_up_after(error)
        return INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        print(f"Error: What is printed cannot be written: {reason(error)}.", file=sys.stderr)
        _drop_what_output_refuses()
        return WRONG_INPUT
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        print(
            "Error: There is not enough memory; lower 'batch_size' or the lengths of 'data', raise 'microbatches', or"
            " set 'model.remat' to 'dots' or 'full'.",
            file=sys.stderr,
        )
        return OUT_OF_MEMORY


def _run(argv: list[str]) -> int:
    parser = command_line()
    if not argv:
        parser.print_help(sys.stderr)
        return WRONG_INPUT
    if argv[0] == "help":
        argv = [*argv[1:], "--help"]
    args, overrides = parser.parse_known_args(argv)
    if overrides and not getattr(args, "takes_overrides", False):
        raise UserError(f"Unknown argument '{overrides[0]}' for '{args.command}'; see --help.")
    args.overrides = overrides
    with interrupts.second_one_leaves(), together(args):
        keep_programs(args)
        return COMMANDS[args.command].run(args) or 0


def command_line() -> CommandParser:
    """Return the parser of all commands."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    program = program_name()
    parser = CommandParser(prog=program, description=description, epilog=examples.replace(MODULE_CALL, program))
    parser.add_argument("--version", action="version", version=f"based_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        module.add_arguments(add_command(commands, name, module.__doc__))
    return parser


def _nobody_reads() -> bool:
    """Return whether standard output is a pipe that was closed, and let what is left to print go nowhere."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # a notebook's, or a test's
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed


def _drop_what_output_refuses() -> None:
    """Let what is left to print go nowhere where standard output does not take it: Python would try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, of the machine or, as XLA says it, of a device."""
    said = str(error)
    return isinstance(error, MemoryError) or said.startswith("RESOURCE_EXHAUSTED") or "Out of memory allocating" in said


if __name__ == "__main__":
    sys.exit(main())

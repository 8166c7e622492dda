"""Train the points of a sweep file into a store, list what is missing, or draw the pictures of a store.

examples:
  python -m based_jax sweep run experiments/mqar_pareto/sweeps.py:tiny --store=runs/tiny
  python -m based_jax sweep list experiments/mqar_pareto/sweeps.py:tiny --store=runs/tiny
  python -m based_jax sweep plot --store=runs/tiny --out=runs/pictures
"""

import argparse
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.distributed import add_distributed_arguments
from based_jax.commands.parser import CommandParser, add_command
from based_jax.errors import UserError, unknown
from based_jax.revision import command

RUN = """Train every point that the store has no row of.

examples:
  python -m based_jax sweep run experiments/mqar_pareto/sweeps.py:tiny --store=runs/tiny
  python -m based_jax sweep run sweeps.py --store=runs/rows --processes=8
  python -m based_jax sweep run sweeps.py --store=runs/rows --launcher=slurm --tasks=16 --script=job.sh
"""
LIST = """Print the points that the store has no row of.

examples:
  python -m based_jax sweep list experiments/mqar_pareto/sweeps.py:tiny --store=runs/tiny
"""
PLOT = """Draw a picture of a store: PNG, SVG and PDF, of the frontier an HTML page as well.

examples:
  python -m based_jax sweep plot --store=runs/tiny --out=runs/pictures
  python -m based_jax sweep plot --store runs/one runs/two --out=runs/pictures --picture=ablation
"""
PAGE_TITLE = "Recall against bytes of state"
LAUNCHERS = ("local", "ray", "slurm")
LAUNCHERS_OF_OPTIONS = {
    "processes": (("local",), 1),
    "part": (("local",), "0/1"),
    "seconds": (("local",), None),
    "tasks": (("ray", "slurm"), 8),
    "script": (("slurm",), None),
}
"""Of an option that not all launchers know: those that do, and its default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their arguments."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="action")
    _add_run(add_command(commands, "run", RUN))
    missing = add_command(commands, "list", LIST)
    missing.add_argument("sweep", help="sweep file, optionally with a variant: path/to/sweeps.py:variant")
    missing.add_argument("--store", required=True, help="folder of the rows")
    plot = add_command(commands, "plot", PLOT)
    plot.add_argument("--store", required=True, nargs="+", help="folders of rows, or files")
    plot.add_argument("--out", required=True, help="folder of the pictures")
    plot.add_argument("--picture", default="frontier", help="frontier, figure3 or ablation (default: frontier)")
    plot.add_argument("--title", default=PAGE_TITLE, help="of the page")


def _add_run(parser: CommandParser) -> None:
    parser.add_argument("sweep", help="sweep file, optionally with a variant: path/to/sweeps.py:variant")
    parser.add_argument("--store", required=True, help="folder of the rows; the same command goes on where it stopped")
    parser.add_argument("--launcher", default="local", help=f"{', '.join(LAUNCHERS)} (default: local)")
    parser.add_argument("--lanes", type=int, default=16, help="trials trained together, at most (default: 16)")
    parser.add_argument(
        "--workers",
        type=int,
        help="groups trained at a time on each device (default: by its kind), or runs (default: 1)",
    )
    parser.add_argument("--processes", type=int, default=1, help="local: to spread the sweep over (default: 1)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="local: begin no group, and no run, after so many (default: any)"
    )
    parser.add_argument("--part", default="0/1", help="i/n: every n-th group from the i-th on (default: all)")
    parser.add_argument(
        "--tasks", type=int, default=8, help="ray, slurm: parts that the sweep is cut into (default: 8)"
    )
    parser.add_argument("--script", help="slurm: write the job here instead of submitting it")
    add_distributed_arguments(parser)
    add_compiled_argument(parser)


def run(args: argparse.Namespace) -> int | None:
    """Do what the subcommand says; return 1 if a part of a sweep has failed."""
    actions: dict[str, Callable[[argparse.Namespace], int | None]] = {"run": _run, "list": _list, "plot": _plot}
    return actions[args.action](args)


def _run(args: argparse.Namespace) -> int:
    from based_jax.sweep import launch
    from based_jax.sweep.schedule import SweepFailedError, SweepOptions

    _check_options(args)
    until = math.inf if args.seconds is None else time.time() + args.seconds
    options = SweepOptions(args.lanes, args.workers, part=part(args.part), command=command(), until=until)
    calls: dict[str, Callable] = {
        "local": launch.local,
        "ray": functools.partial(launch.on_ray, tasks=args.tasks),
        "slurm": functools.partial(launch.on_slurm, tasks=args.tasks, script=args.script),
    }
    if args.processes > 1:
        calls["local"] = functools.partial(launch.in_processes, processes=args.processes)
    try:
        _interruptible(calls[args.launcher], args.sweep, args.store, options)
    except SweepFailedError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Check numbers, and that no option is given which the launcher would pass over."""
    for name in ("lanes", "workers", "tasks", "processes"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}; it is at least 1.")
    if args.seconds is not None and not args.seconds >= 0:
        raise UserError(f"--seconds is {args.seconds}; it is at least 0.")
    if args.launcher not in LAUNCHERS:
        raise unknown("launcher", args.launcher, LAUNCHERS)
    for name, (launchers, default) in LAUNCHERS_OF_OPTIONS.items():
        if args.launcher not in launchers and getattr(args, name) != default:
            raise UserError(f"--{name} is for --launcher={' or '.join(launchers)}, not for {args.launcher}.")


def _interruptible(call: Callable, *arguments: Any) -> None:
    """Call, and leave at once when interrupted: rows are on the disk, and what compiles cannot be waited for."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers ask with it
    try:
        call(*arguments)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on where it was.", file=sys.stderr, flush=True)
        os._exit(130)


def part(text: str) -> tuple[int, int]:
    """Return (i, n) of "i/n".

    Raises:
      UserError: it is something else, or i is not in [0, n).
    """
    first, slash, number = text.partition("/")
    if not (slash and first.isdecimal() and number.isdecimal() and int(first) < int(number)):
        raise UserError(f"--part is '{text}'; it is i/n with 0 <= i < n, such as 0/4.")
    return int(first), int(number)


def _list(args: argparse.Namespace) -> None:
    from based_jax.store import Store
    from based_jax.sweep.schedule import unfinished
    from based_jax.sweep.trial import load_sweep

    sweep, store = load_sweep(args.sweep), Store(args.store)
    missing = unfinished(sweep, store)
    for point, _ in missing:
        print(point)
    there = "" if store.path.exists() else ", which does not exist yet"
    print(f"{len(missing)} of {len(sweep.trials())} points have no row in '{args.store}'{there}.")


def _plot(args: argparse.Namespace) -> None:
    from based_jax.folders import local_path
    from based_jax.pictures import figures, page

    draw = {"frontier": figures.frontier, "figure3": figures.figure3, "ablation": figures.ablation}
    if args.picture not in draw:
        raise unknown("picture", args.picture, draw)
    out = local_path(args.out, "--out")
    rows = [row for store in args.store for row in _rows(store)]
    if not rows:
        raise UserError(f"There are no rows in {', '.join(map(repr, args.store))}.")
    drawn = draw[args.picture](rows, out / args.picture)
    if args.picture == "frontier":
        drawn.append(page.write(rows, out / "frontier.html", title=args.title))
    print(f"Drawn: {', '.join(map(str, drawn))}.")


def _rows(path: str) -> list[dict[str, Any]]:
    from based_jax.store import Store

    store = Store(path)
    if not store.path.exists():
        raise UserError(f"Store '{path}' does not exist; name a folder of rows, or a file.")
    return store.rows()

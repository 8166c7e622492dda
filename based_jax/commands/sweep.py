"""Train the points of a sweep file into a store, list what is missing, or draw the pictures of a store."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Any

from based_jax.errors import UserError, unknown

PAGE_TITLE = "Recall against bytes of state"
LAUNCHERS = ("local", "ray", "slurm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their arguments."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="action")
    _add_run(commands.add_parser("run", help="train every point that the store has no row of"))
    missing = commands.add_parser("list", help="print the points that the store has no row of")
    missing.add_argument("sweep", help="sweep file, optionally with a variant: path/to/sweeps.py:variant")
    missing.add_argument("--store", required=True, help="folder of the rows")
    plot = commands.add_parser(
        "plot", help="draw a picture of a store: PNG, SVG and PDF, of the frontier an HTML page as well"
    )
    plot.add_argument("--store", required=True, nargs="+", help="folders of rows, or files")
    plot.add_argument("--out", required=True, help="folder of the pictures")
    plot.add_argument("--picture", default="frontier", help="frontier, figure3 or ablation (default: frontier)")
    plot.add_argument("--title", default=PAGE_TITLE, help="of the page")


def _add_run(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--part", default="0/1", help="i/n: every n-th group from the i-th on (default: all)")
    parser.add_argument(
        "--tasks", type=int, default=8, help="ray, slurm: parts that the sweep is cut into (default: 8)"
    )
    parser.add_argument("--script", help="slurm: write the job here instead of submitting it")


def run(args: argparse.Namespace) -> None:
    """Do what the subcommand says."""
    {"run": _run, "list": _list, "plot": _plot}[args.action](args)


def _run(args: argparse.Namespace) -> None:
    from based_jax.sweep import launch
    from based_jax.sweep.schedule import SweepOptions

    for name in ("lanes", "tasks", "processes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it is at least 1.")
    if args.launcher not in LAUNCHERS:
        raise unknown("launcher", args.launcher, LAUNCHERS)
    command = shlex.join(["python", "-m", "based_jax", *sys.argv[1:]])
    options = SweepOptions(args.lanes, args.workers, part=part(args.part), command=command)
    if args.launcher == "local" and args.processes > 1:
        _interruptible(launch.in_processes, args.sweep, args.store, options, processes=args.processes)
    elif args.launcher == "local":
        _interruptible(launch.local, args.sweep, args.store, options)
    elif args.launcher == "ray":
        launch.on_ray(args.sweep, args.store, options, tasks=args.tasks)
    else:
        launch.on_slurm(args.sweep, args.store, options, tasks=args.tasks, script=args.script)


def _interruptible(call: Callable, *arguments: Any, **options: Any) -> None:
    """Call, and leave at once when interrupted: rows are on the disk, and what compiles cannot be waited for."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers ask with it
    try:
        call(*arguments, **options)
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

    sweep = load_sweep(args.sweep)
    missing = list(unfinished(sweep, Store(args.store)))
    for point in missing:
        print(point)
    print(f"{len(missing)} of {sum(1 for _ in sweep.trials())} points have no row in '{args.store}'.")


def _plot(args: argparse.Namespace) -> None:
    from based_jax.folders import local_folder
    from based_jax.pictures import figures, page
    from based_jax.store import Store

    draw = {"frontier": figures.frontier, "figure3": figures.figure3, "ablation": figures.ablation}
    if args.picture not in draw:
        raise unknown("picture", args.picture, draw)
    out = local_folder(args.out, "--out")
    rows = [row for store in args.store for row in Store(store).rows()]
    if not rows:
        raise UserError(f"There are no rows in {', '.join(map(repr, args.store))}.")
    drawn = draw[args.picture](rows, out / args.picture)
    if args.picture == "frontier":
        drawn.append(page.write(rows, out / "frontier.html", title=args.title))
    print(f"Drawn: {', '.join(map(str, drawn))}.")

"""Configs and other libraries' models to time: one here, each of several in a process of its own."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from based_jax.commands.parser import out_file
from based_jax.commands.train import parse_overrides
from based_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is timed and where rows go; `--config.a.b=value` overrides are taken beside them."""
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        help="config files, optionally with a variant: configs/x.py:variant",
    )
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="leave out where the time goes")
    parser.add_argument("--peers", action="store_true", help="time whole models of other libraries as well")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="time these peers alone")
    parser.add_argument("--out", type=out_file, help="append a JSON row of each to this file")
    parser.set_defaults(takes_overrides=True)


def run(
    args: argparse.Namespace,
    peers: Mapping,
    words: Sequence[str],
    measure: Callable[[argparse.Namespace, str], None],
    measure_peer: Callable[[argparse.Namespace, str], None],
) -> int:
    """Time what the arguments name; return 1 if one of several failed.

    Args:
      args: see `add_arguments`.
      peers: the table that their names are of.
      words: what a process is told beside the name of what it times, of the task's own arguments.
      measure, measure_peer: time one by its name, here.
    """
    from based_jax.bench.peers import check, installed

    for name in args.peer:
        check(peers, name)
    chosen = [*args.peer, *(installed(peers) if args.peers else ())]
    if not args.config and not chosen:
        raise UserError("There is nothing to time: give --config or --peers.")
    parse_overrides(args.overrides)
    if len(args.config) == 1 and not chosen:
        measure(args, args.config[0])
        return 0
    if len(chosen) == 1 and not args.config and not args.peers:
        measure_peer(args, chosen[0])
        return 0
    tasks = [f"--config={name}" for name in args.config] + [f"--peer={name}" for name in chosen]
    words = [*words, *args.overrides, *([f"--out={args.out}"] if args.out else [])]
    words += [] if args.profile else ["--no-profile"]
    return max([_alone([args.task, task, *words]) for task in tasks])


def _alone(words: Sequence[str]) -> int:
    """Run a task of `bench` in a process of its own; return 1 if it failed."""
    sys.stdout.flush()
    return min(1, abs(subprocess.run([sys.executable, "-m", "based_jax", "bench", *words]).returncode))

"""Time whole training steps of configs on random tokens: tokens/s, MFU, HFU, MBU, memory, seconds to compile, and where
the time goes.

Several configs, and peers, each run in a process of their own, so that each has the device to itself.

examples:
  python -m based_jax bench train --config=configs/based.py:360m --config.batch_size=16 --config.microbatches=1
  python -m based_jax bench train --config configs/based.py:1b configs/mamba.py:1b --rows=8 --peers --out=rows.jsonl
  python -m based_jax bench train --config=configs/text_tiny.py --seq-len=1024 --documents=4
"""

import argparse
import subprocess
import sys

from based_jax.commands.parser import out_file
from based_jax.commands.train import parse_overrides
from based_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments; `--config.a.b=value` overrides are taken beside them."""
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        help="config files, optionally with a variant: configs/x.py:variant",
    )
    parser.add_argument("--rows", type=int, metavar="N", help="in one microbatch, in place of the config's batch")
    parser.add_argument("--seq-len", type=int, metavar="T", help="tokens of a row (default: the config's)")
    parser.add_argument("--documents", type=int, default=1, help="that a row is packed of (default: 1, without ids)")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (default: 20)")
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="leave out where the time goes")
    parser.add_argument("--peers", action="store_true", help="time whole models of other libraries as well")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="time these peers alone")
    parser.add_argument("--out", type=out_file, help="append a JSON row of each to this file")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print the rows, and append them; return 1 if one of several failed."""
    from based_jax.bench import train_peers

    for name in args.peer:
        train_peers.check(name)
    peers = [*args.peer, *(train_peers.installed() if args.peers else ())]
    if not args.config and not peers:
        raise UserError("There is nothing to time: give --config or --peers.")
    parse_overrides(args.overrides)
    if len(args.config) == 1 and not peers:
        _measure(args, args.config[0])
        return 0
    if len(peers) == 1 and not args.config and not args.peers:
        _measure_peer(args, peers[0])
        return 0
    tasks = [[f"--config={name}"] for name in args.config] + [[f"--peer={name}"] for name in peers]
    return max([_alone(args, task) for task in tasks])


def _alone(args: argparse.Namespace, task: list[str]) -> int:
    """Run one of several in a process of its own; return 1 if it failed."""
    words = [f"--steps={args.steps}", f"--documents={args.documents}", *args.overrides]
    words += [f"--{key.replace('_', '-')}={x}" for key in ("rows", "seq_len", "out") if (x := getattr(args, key))]
    words += [] if args.profile else ["--no-profile"]
    command = [sys.executable, "-m", "based_jax", "bench", "train", *task, *words]
    sys.stdout.flush()
    return min(1, abs(subprocess.run(command).returncode))


def _measure(args: argparse.Namespace, name: str) -> None:
    from based_jax import config as configs
    from based_jax.bench import rows, train
    from based_jax.train.run import TrainConfig

    overrides = [*parse_overrides(args.overrides), *_given(args)]
    config = configs.build(TrainConfig, configs.load(name, overrides))
    row = {"config": name} | train.measure(config, args.steps, args.documents, args.profile)
    print("\n".join([f"{name} {train.lines(row)[0]}", *train.lines(row)[1:]]), flush=True)
    with rows.appended(args.out) as write:
        write(row)


def _given(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return what `--rows` and `--seq-len` say as overrides."""
    rows = [] if args.rows is None else [("batch_size", str(args.rows)), ("microbatches", "1")]
    return rows + ([] if args.seq_len is None else [("data.seq_len", str(args.seq_len))])


def _measure_peer(args: argparse.Namespace, name: str) -> None:
    from based_jax.bench import rows, train_peers

    size = train_peers.Size(args.rows or train_peers.ROWS, args.seq_len or train_peers.SEQ_LEN, args.steps)
    row = {"config": name} | train_peers.measure(name, size)
    print(f"{name} {train_peers.line(row)}", flush=True)
    with rows.appended(args.out) as write:
        write(row)

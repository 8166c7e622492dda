"""Time whole training steps of configs on random tokens: tokens/s, MFU, HFU, MBU, memory, seconds to compile, and where
the time goes.

Several configs, and peers, each run in a process of their own, so that each has the device to itself.

examples:
  python -m based_jax bench train --config=configs/based.py:360m --config.batch_size=16 --config.microbatches=1
  python -m based_jax bench train --config configs/based.py:1b configs/mamba.py:1b --rows=8 --peers --out=rows.jsonl
  python -m based_jax bench train --config=configs/text_tiny.py --seq-len=1024 --documents=4
  python -m based_jax bench train --config=configs/based.py:1b --rows=8 --compile-only
"""

import argparse

from based_jax.commands.bench import several
from based_jax.commands.train import parse_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments; `--config.a.b=value` overrides are taken beside them."""
    several.add_arguments(parser)
    parser.add_argument("--rows", type=int, metavar="N", help="in one microbatch, in place of the config's batch")
    parser.add_argument("--seq-len", type=int, metavar="T", help="tokens of a row (default: the config's)")
    parser.add_argument("--documents", type=int, default=1, help="that a row is packed of (default: 1, without ids)")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (default: 20)")
    parser.add_argument(
        "--compile-only", action="store_true", help="keep the compiled programs for a run after this one, and time none"
    )


def run(args: argparse.Namespace) -> int:
    """Print the rows, and append them; return 1 if one of several failed."""
    from based_jax.bench import train_peers

    words = [f"--steps={args.steps}", f"--documents={args.documents}"]
    words += [f"--{key.replace('_', '-')}={x}" for key in ("rows", "seq_len") if (x := getattr(args, key))]
    words += ["--compile-only"] * args.compile_only
    return several.run(args, train_peers.PEERS, words, _measure, _measure_peer)


def _measure(args: argparse.Namespace, name: str) -> None:
    from based_jax import config as configs
    from based_jax.bench import rows, train
    from based_jax.train.run import TrainConfig

    overrides = [*parse_overrides(args.overrides), *_given(args)]
    config = configs.build(TrainConfig, configs.load(name, overrides))
    if args.compile_only:
        print(f"{name}: compiled in {train.compile_programs(config, args.documents):.1f} s", flush=True)
        return
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

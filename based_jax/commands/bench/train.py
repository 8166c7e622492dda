"""Time whole training steps of a config: tokens/s, MFU, memory and seconds to compile.

examples:
  python -m based_jax bench train --config=configs/based.py:360m --steps=50 --out=rows.jsonl
  python -m based_jax bench train --config=configs/text_tiny.py --config.batch_size=8
"""

import argparse

from based_jax.commands.parser import out_file
from based_jax.commands.train import parse_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments; `--config.a.b=value` overrides are taken beside them."""
    parser.add_argument("--config", required=True, help="config file, optionally with a variant: configs/x.py:variant")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (default: 20)")
    parser.add_argument("--out", type=out_file, help="append one JSON row to this file")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    """Print the row, and append it."""
    from based_jax import config as configs
    from based_jax.bench import rows, train
    from based_jax.train.run import TrainConfig

    config = configs.build(TrainConfig, configs.load(args.config, parse_overrides(args.overrides)))
    row = {"config": args.config} | train.measure(config, args.steps)
    print(train.line(row))
    with rows.appended(args.out) as write:
        write(row)

"""Train a model from a config file, or continue a stopped run.

examples:
  python -m based_jax train --config=configs/mqar_tiny.py:taylor_8 --workdir=runs/mqar
  python -m based_jax train --config=configs/text_tiny.py --workdir=runs/text --config.steps=1000 --config.optim.lr=1e-3
  python -m based_jax train --config=configs/based.py:360m_10b --workdir=runs/based --config.data.path=my_texts
"""

import argparse

from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.distributed import add_distributed_arguments
from based_jax.commands.parser import CommandParser
from based_jax.errors import UserError

OVERRIDE_PREFIX = "--config."


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments; `--config.a.b=value` overrides are taken beside them."""
    parser.add_argument("--config", required=True, help="config file, optionally with a variant: configs/x.py:variant")
    parser.add_argument("--workdir", required=True, help="folder of the run; the same command continues it")
    add_distributed_arguments(parser)
    add_compiled_argument(parser)
    parser.set_defaults(takes_overrides=True)
    parser.details = _details


def run(args: argparse.Namespace) -> None:
    """Train to the end and print the final evaluation."""
    from based_jax import config as configs
    from based_jax.train.loop import train
    from based_jax.train.run import build_config

    config = build_config(configs.load(args.config, parse_overrides(args.overrides)), args.workdir)
    for name, value in train(config, args.workdir).items():
        print(f"{name:24} {value:.4f}")


def _details() -> str:
    """Return what `--help` says of a config's keys; it takes seconds to import jax."""
    from based_jax.commands.config_help import config_help, options_help
    from based_jax.nn.mixers import MIXERS
    from based_jax.train.run import TrainConfig

    return f"{config_help(TrainConfig)}\n{options_help(MIXERS)}"


def parse_overrides(words: list[str]) -> list[tuple[str, str]]:
    """Return (dotted key, text) pairs of words such as '--config.model.d_model=128'.

    Raises:
      UserError: a word is something else.
    """
    pairs = []
    for word in words:
        key, equals, text = word.removeprefix(OVERRIDE_PREFIX).partition("=")
        if not word.startswith(OVERRIDE_PREFIX) or not equals or not key:
            raise UserError(f"Unknown argument '{word}'; overrides look like {OVERRIDE_PREFIX}model.d_model=128.")
        pairs.append((key, text))
    return pairs

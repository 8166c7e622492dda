"""Pack the text of a config ahead of its runs, which then only read it.

examples:
  python -m based_jax prepare --config=configs/based.py:360m --config.data.path=my_texts --config.data.processes=16
  python -m based_jax prepare --config=configs/text_tiny.py --config.data.cache_dir=/shared/packed
"""

import argparse

from based_jax.commands.parser import CommandParser
from based_jax.commands.train import parse_overrides
from based_jax.errors import UserError


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments; `--config.a.b=value` overrides are taken beside them."""
    parser.add_argument("--config", required=True, help="config file, optionally with a variant: configs/x.py:variant")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    """Pack what is not packed yet; print what there is to train on, and where it is kept."""
    from based_jax import config as configs
    from based_jax.train.run import build_config
    from based_jax.train.tasks import TextTask

    config = build_config(configs.load(args.config, parse_overrides(args.overrides)))
    if not isinstance(config.data, TextTask):
        raise UserError(f"data.kind is '{config.data.kind}', which keeps nothing; it is 'text' to prepare.")
    source = config.data.open(config.batch_size)
    print(*source.summary, *(f"packed in {folder}" for folder in source.folders), sep="\n")

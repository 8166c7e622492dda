"""Train a model from a config file, or continue a stopped run."""

import argparse

from based_jax.errors import UserError

OVERRIDE_PREFIX = "--config."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; `--config.a.b=value` overrides are taken beside them."""
    parser.add_argument("--config", required=True, help="config file, optionally with a variant: configs/x.py:variant")
    parser.add_argument("--workdir", required=True, help="folder of the run; the same command continues it")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    """Train to the end and print the final evaluation."""
    from based_jax import config as configs
    from based_jax.train.loop import train
    from based_jax.train.run import TrainConfig

    config = configs.build(TrainConfig, configs.load(args.config, parse_overrides(args.overrides)))
    for name, value in train(config, args.workdir).items():
        print(f"{name:24} {value:.4f}")


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

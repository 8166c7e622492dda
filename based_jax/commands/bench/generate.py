"""Time generation by models of random weights: decoding by batch and context, and reading prompts, apart, beside the
speed at which their weights and state can be read.

Several configs, and peers, each run in a process of their own, so that each has the device to itself.

examples:
  python -m based_jax bench generate --config=configs/based.py:1b --batch 1 128 512 --context 2048 65536
  python -m based_jax bench generate --config=configs/based.py:1b --sizes 128x2048 --option=taylor.flush=16
  python -m based_jax bench generate --config=configs/based.py:1b --sizes 128x2048 --option=taylor.flush=16 --drafts=3
  python -m based_jax bench generate --config configs/based.py:1b configs/attention.py:1b --peers --out=rows.jsonl
  python -m based_jax bench generate --config=configs/based.py:1b --sizes 128x2048 --compile-only
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

from based_jax.bench.defaults import MEMORY_FRACTION
from based_jax.commands.bench import several
from based_jax.commands.text_models import add_option_argument
from based_jax.commands.train import parse_overrides

BATCHES, CONTEXTS = (1, 8, 32, 128, 512), (512, 2048, 4096, 16384, 65536)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments; `--config.a.b=value` overrides are taken beside them."""
    several.add_arguments(parser)
    parser.add_argument(
        "--batch", nargs="+", type=int, default=BATCHES, metavar="B", help=f"sequences (default: {_words(BATCHES)})"
    )
    parser.add_argument(
        "--context",
        nargs="+",
        type=int,
        default=CONTEXTS,
        metavar="T",
        help=f"tokens that each has had (default: {_words(CONTEXTS)})",
    )
    parser.add_argument("--sizes", nargs="+", default=[], metavar="BxT", help="batch x context, in place of the two")
    add_option_argument(parser)
    parser.add_argument("--tokens", type=int, default=32, help="that one program decodes of each (default: 32)")
    parser.add_argument("--blocks", type=int, default=5, help="runs of it that a median is of (default: 5)")
    parser.add_argument(
        "--drafts", type=int, default=0, metavar="N", help="verify N drafted tokens with each one that is decoded"
    )
    parser.add_argument("--no-prefill", dest="prefill", action="store_false", help="read no prompts")
    parser.add_argument(
        "--compile-only", action="store_true", help="keep the compiled programs for a run after this one, and time none"
    )


def run(args: argparse.Namespace) -> int:
    """Print the rows, and append them; return 1 if one of several failed."""
    from based_jax.bench import generate_peers

    sizes, effort = _sizes_and_effort(args)
    words = ["--sizes", *(f"{batch}x{context}" for batch, context in sizes)]
    words += [f"--option={option}" for option in args.option]
    words += [f"--tokens={effort.tokens}", f"--blocks={effort.blocks}", *([] if effort.prefill else ["--no-prefill"])]
    words += [f"--drafts={effort.drafts}"] if effort.drafts else []
    words += ["--compile-only"] * args.compile_only
    return several.run(args, generate_peers.PEERS, words, _measure, _measure_peer)


def _measure(args: argparse.Namespace, name: str) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    from based_jax import config as configs
    from based_jax.bench import generate
    from based_jax.nn.lm_config import with_options
    from based_jax.train.run import TrainConfig

    overrides = parse_overrides(args.overrides)
    config = configs.build(TrainConfig, configs.load(name, overrides)).model
    config = with_options(config, args.option)
    if args.compile_only:
        seconds = generate.compile_programs(config, *_sizes_and_effort(args))
        print(f"{name}: compiled in {seconds:.1f} s", flush=True)
        return
    start = {"config": name, "overrides": dict(overrides), "options": sorted(args.option)}
    _print(args, start, generate.measure(config, *_sizes_and_effort(args)))


def _measure_peer(args: argparse.Namespace, name: str) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch has the memory
    from based_jax.bench import generate_peers

    _print(args, {"config": name}, generate_peers.measure(name, *_sizes_and_effort(args)))


def _sizes_and_effort(args: argparse.Namespace) -> tuple:
    from based_jax.bench.generate_size import Effort, Size, products

    sizes = list(map(Size.parse, args.sizes)) or products(args.batch, args.context)
    return sizes, Effort(args.tokens, args.blocks, args.profile, args.prefill, args.drafts)


def _print(args: argparse.Namespace, start: dict[str, Any], found: Iterator[dict[str, Any]]) -> None:
    from based_jax.bench import generate_size, rows

    with rows.appended(args.out) as write:
        for row in found:
            first, *more = generate_size.lines(row)
            print("\n".join([f"{start['config']} {first}", *more]), flush=True)
            write(start | row)


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))

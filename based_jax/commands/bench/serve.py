"""Time the server with a model of random weights over HTTP: tokens a second, and how long clients wait for the first
text and from token to token.

Each client asks for one text after the other; those of a first round, as many again, are not timed. The tokenizer is
gpt2's, which the model's vocabulary has to hold.

examples:
  python -m based_jax bench serve --config=configs/based.py:1b --option=taylor.flush=16 --clients 1 16 128
  python -m based_jax bench serve --config=configs/based.py:1b --clients=200 --slots=64 --prompt=64-2048 --new=16-256
  python -m based_jax bench serve --config=configs/based.py:1b --clients=16 --compile-only
"""

import argparse
import os

from based_jax.bench.defaults import MEMORY_FRACTION
from based_jax.commands.parser import out_file
from based_jax.commands.text_models import add_option_argument
from based_jax.commands.train import parse_overrides
from based_jax.errors import UserError, installs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments; `--config.a.b=value` overrides are taken beside them."""
    parser.add_argument(
        "--config", required=True, help="a config file, optionally with a variant: configs/x.py:variant"
    )
    add_option_argument(parser)
    parser.add_argument(
        "--clients", nargs="+", type=int, default=(1, 16, 128), metavar="N", help="at a time (default: 1 16 128)"
    )
    parser.add_argument("--slots", type=int, metavar="N", help="texts that are written at once (default: most clients)")
    parser.add_argument("--texts", type=int, default=2, metavar="N", help="that each client asks for (default: 2)")
    parser.add_argument("--prompt", default="512", metavar="T", help="tokens, or from 64-2048 (default: 512)")
    parser.add_argument("--new", default="128", metavar="T", help="tokens of each text, or from 16-256 (default: 128)")
    parser.add_argument("--drafts", type=int, default=0, metavar="N", help="verify N looked-up tokens with each")
    parser.add_argument(
        "--compile-only", action="store_true", help="keep the compiled programs for a run after this one, and time none"
    )
    parser.add_argument("--out", type=out_file, help="append a JSON row of each to this file")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    """Print the rows, and append them."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    from based_jax import config as configs
    from based_jax.bench import rows
    from based_jax.nn.lm_config import with_options
    from based_jax.train.run import TrainConfig

    try:
        from based_jax.bench import serve
    except ModuleNotFoundError as error:
        raise UserError(f"bench serve needs {error.name}: {installs('serve')} brings it.") from None
    prompt, new = map(serve.Span.parse, (args.prompt, args.new))
    for name, count in (("texts", args.texts), *(("clients", count) for count in args.clients)):
        if count < 1:
            raise UserError(f"{name} is {count}; it is at least 1.")
    overrides = parse_overrides(args.overrides)
    config = with_options(configs.build(TrainConfig, configs.load(args.config, overrides)).model, args.option)
    start = {"config": args.config, "overrides": dict(overrides), "options": sorted(args.option)}
    loads = [serve.Load(count, args.texts, prompt, new) for count in args.clients]
    if args.compile_only:
        seconds = serve.compile_programs(config, loads, args.slots, args.drafts)
        print(f"{args.config}: a server has compiled in {seconds:.1f} s", flush=True)
        return
    with rows.appended(args.out) as write:
        for row in serve.measure(config, loads, args.slots, args.drafts):
            print(f"{args.config} {serve.line(row)}", flush=True)
            write(start | row)

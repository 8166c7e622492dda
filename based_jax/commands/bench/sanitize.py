"""Run a small call of every kernel under compute-sanitizer.

examples:
  python -m based_jax bench sanitize --tools memcheck racecheck
"""

import argparse

from based_jax.bench.defaults import SANITIZER_TOOLS
from based_jax.commands.parser import out_file, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments."""
    parser.add_argument("--tools", nargs="+", default=SANITIZER_TOOLS, help="default: all three")
    parser.add_argument("--out", type=out_file, help="the tools' words; replaced")
    parser.add_argument("--limit", type=seconds, default=200, help="seconds for each tool (default: 200)")
    parser.add_argument("--inner", action="store_true", help="only run the calls: what the tools are given")


def run(args: argparse.Namespace) -> int:
    """Run the calls under each tool, or alone; return 0 if no tool found anything."""
    from based_jax.bench import sanitize

    if args.inner:
        return 0 if sanitize.call_kernels() else 1
    codes, texts = [], []
    for code, text in sanitize.reports(args.tools, args.limit):
        print(text, flush=True)
        codes.append(code)
        texts.append(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(texts), encoding="utf-8")
    return max(codes)

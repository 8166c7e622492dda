"""Time how text and tokens are packed and read, and in how much memory, on corpora that are made up and removed.

examples:
  python -m based_jax bench data --tokens=20000000
  python -m based_jax bench data --tokens=1000000000 --kinds bin jsonl --processes=2 --out=rows.jsonl
"""

import argparse
import os

from based_jax.commands.parser import out_file

KINDS = ("bin", "jsonl", "jsonl.zst", "parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments."""
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of each corpus, about (default: 20000000)")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help=f"of its files, some of {' '.join(KINDS)}; all")
    parser.add_argument("--processes", type=int, default=1, help="that encode text (default: 1)")
    parser.add_argument("--folder", help="where corpora are written and removed (default: a temporary one)")
    parser.add_argument("--out", type=out_file, help="append a JSON row a kind to this file")


def run(args: argparse.Namespace) -> None:
    """Print the rows as they come, and append them."""
    from based_jax.bench import data, rows
    from based_jax.folders import local_path

    folder = None if args.folder is None else local_path(args.folder, "folder")
    corpora = [data.Corpus(kind, args.tokens, args.processes) for kind in args.kinds]
    with rows.appended(args.out) as write:
        for corpus in corpora:
            row = data.measure(corpus, folder) | rows.facts("numpy", "grain", "pyarrow")
            row["device"] += f", {os.cpu_count()} cores"
            print(data.line(row), flush=True)
            write(row)

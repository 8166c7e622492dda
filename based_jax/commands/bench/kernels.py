"""Time the accelerator kernels, beside their floors and, with --peers, the same shapes through PyTorch's libraries.

examples:
  python -m based_jax bench kernels --ops all --out=rows.jsonl
  python -m based_jax bench kernels --ops taylor_attention --shapes 8x16x2048 --peers
  python -m based_jax bench kernels --ops taylor_attention --shapes 8x16x2048x16x112
"""

import argparse
import os
from collections.abc import Sequence

from based_jax.bench.defaults import REPEATS
from based_jax.commands.parser import out_file
from based_jax.errors import UserError, unknown

HEADER = (
    f"{'operation':22}{'implementation':22}{'(B,H,T)':>22} {'pass':17}"
    f"{'us':>10}{'floor':>9}{'ratio':>8}{'TB/s':>7}{'TFLOP/s':>9}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments."""
    parser.add_argument("--ops", nargs="+", default=["taylor_attention", "attention"], help="operations, or 'all'")
    parser.add_argument(
        "--impls", nargs="+", default=[], help="implementations and peers (default: the accelerated ones and 'xla')"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["table"],
        help="BxHxT, BxHxTxKxV or a set: table, lengths, batches, short",
    )
    parser.add_argument("--peers", action="store_true", help="measure PyTorch's libraries in the same run")
    parser.add_argument(
        "--repeats",
        type=int,
        default=REPEATS,
        help="calls a median is of, if they are not slow (default: %(default)s)",
    )
    parser.add_argument("--out", type=out_file, help="append one JSON row per measurement to this file")


def run(args: argparse.Namespace) -> None:
    """Print one line per measurement as it comes."""
    if args.peers:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from based_jax.bench import torch_peers

        torch_peers.check()
    from based_jax.bench import kernels, rows

    names = parse_names(args.ops)
    if args.repeats < 1:
        raise UserError(f"repeats is {args.repeats}; it is at least 1.")
    shapes = [shape for text in args.shapes for shape in kernels.SHAPE_SETS.get(text) or [parse_shape(text)]]
    measured = kernels.measure(names, shapes, impls=args.impls, peers=args.peers, repeats=args.repeats)
    with rows.appended(args.out) as write:
        for i, row in enumerate(measured):
            if i == 0:
                print(HEADER)
            print(line(row), flush=True)
            write(row)


def parse_names(ops: Sequence[str]) -> list[str]:
    """Return the names of the benchmark, of "all" all.

    Raises:
      UserError: there is no such operation.
    """
    from based_jax.bench.catalogue import TIMED

    for name in ops:
        if name not in (*TIMED, "all"):
            raise unknown("operation", name, [*TIMED, "all"])
    return list(TIMED) if "all" in ops else list(ops)


def line(row: dict) -> str:
    """Return a row of the printed table."""
    shape = f"({','.join(map(str, (row['batch'], row['heads'], row['seq_len'], *row.get('dims', ()))))})"
    start = f"{row['op']:22}{row['impl']:22}{shape:>22} {row['pass']:17}"
    if "error" in row:
        return f"{start} {row['error']}"
    numbers = (row[name] for name in ("floor_microseconds", "ratio_to_floor", "terabytes_per_second", "teraflops"))
    cells = ("-" if x is None else f"{x:.2f}" if x < 100 else f"{x:.0f}" for x in numbers)
    return f"{start}{row['microseconds']:10.1f}{next(cells):>9}{next(cells):>8}{next(cells):>7}{next(cells):>9}"


def parse_shape(text: str) -> tuple[int, ...]:
    """Return (B, H, T) of "BxHxT", with the dims after it if there are any.

    Raises:
      UserError: the text is no shape.
    """
    parts = text.split("x")
    if len(parts) < 3 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(
            f"'{text}' is no shape: give BxHxT, such as 8x16x2048, with other dims as in 8x16x2048x16x112, or "
            "table, lengths, batches or short."
        )
    return tuple(map(int, parts))

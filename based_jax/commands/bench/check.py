"""Compare every kernel with its definition in fp64: results, gradients, the same bits twice.

examples:
  python -m based_jax bench check
  python -m based_jax bench check --quick --only=taylor
"""

import argparse
import os
import secrets
import time

from based_jax.bench.defaults import CHECK_PROCESSES, MEMORY_FRACTION
from based_jax.commands.parser import out_file, seconds
from based_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's arguments."""
    parser.add_argument("--out", type=out_file, help="JSON lines; replaced")
    parser.add_argument("--quick", action="store_true", help="a few of the cases, none of the huge ones")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--impl", default="", help="implementation (default: all that run kernels of our own)")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a fresh one)")
    parser.add_argument(
        "--processes", type=int, default=CHECK_PROCESSES, help="that share the cases; 0 for none (default: %(default)s)"
    )
    parser.add_argument("--limit", type=seconds, default=150, help="seconds to wait for a row (default: 150)")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Print a line per case as it is checked; return 0 if all passed."""
    if args.processes < 0:
        raise UserError(f"processes is {args.processes}; it is at least 0.")
    # JAX reads it when it first meets the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    from based_jax.bench import check, rows

    selection = check.CaseSelection(args.only, args.quick, args.impl)
    if args.part is not None:
        check.print_part(selection, args.seed, args.processes, args.part)
        return 0
    seed = secrets.randbits(32) if args.seed is None else args.seed
    begin, found = time.perf_counter(), []
    with rows.replaced(args.out) as write:
        for row in check.checked(selection, seed, args.processes, args.limit):
            found.append(row)
            print(check.line(row), flush=True)
            write(row | rows.origin())
    failed = check.failed(found, refusals=bool(args.impl))
    print(check.summary(found), f"in {time.perf_counter() - begin:.0f} s, seed {seed}")
    for what in failed:
        print(f"FAILED {what}")
    return 0 if found and not failed else 1

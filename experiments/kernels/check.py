"""Every kernel against the fp64 oracle on one GPU: outputs and gradients, one JSON row per case.

A case passes where each result's error (the norm of the difference over the norm of the oracle's) is below 5e-3, no
token's row is off by more than a quarter of its norm or of those about it, every element is finite though the memory
held NaN before, and a second run gives the same bits.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels import cases, comparison, huge, workers
from experiments.kernels.comparison import both_passes, judged
from experiments.kernels.operations import OPERATIONS, Case, arrays_of, basic, gradients_of, same_program

COMPILERS = 2
"""Programs that a process compiles at the same time; Python works at one of them at a time."""
WORKERS = 8
COPIES = 3
"""Buffers of NaN of each size that a call will ask for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, help="JSON lines; replaced")
    parser.add_argument("--quick", action="store_true", help="a few of the cases, none of the huge ones")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--impl", default="", help="implementation (default: the kernels of each operation)")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a fresh one)")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes; 0 for none (default: {WORKERS})")
    parser.add_argument("--limit", type=float, default=150, help="seconds to wait for a row (default: 150)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Print a line per case as it is checked; return 0 if all passed."""
    args.seed = secrets.randbits(32) if args.seed is None else args.seed
    chosen = [x for x in cases.all_cases() if args.only in str(x) and (x.quick or not args.quick)]
    if args.worker is not None:
        mine = workers.parts(chosen, args.workers)[args.worker]
        for row in rows_of(mine, args.impl, args.seed):
            print(json.dumps(row | facts("check")), flush=True)
        return 0
    begin, rows = time.perf_counter(), []
    with open(args.out, "w") if args.out and _folder(args.out) else contextlib.nullcontext() as file:
        for row in everything(chosen, args):
            rows.append(row)
            print(line(row), flush=True)
            if file:
                print(json.dumps(row | {"command": command("check")}), file=file, flush=True)
    failed = [row["what"] for row in rows if not row["passed"]]
    seconds = time.perf_counter() - begin
    print(f"{len(rows) - len(failed)} of {len(rows)} passed in {seconds:.0f} s, seed {args.seed}; {worst(rows)}")
    for what in failed:
        print(f"FAILED {what}")
    return 0 if rows and not failed else 1


def everything(chosen: list[Case], args: argparse.Namespace) -> Iterator[dict]:
    """Yield the rows of the cases, from workers or from here, and of the huge ones."""
    if args.workers:
        options = [f"--impl={args.impl}", f"--seed={args.seed}", f"--only={args.only}"] + ["--quick"] * args.quick
        yield from workers.rows_of(chosen, args.workers, options, args.limit)
    else:
        for row in rows_of(chosen, args.impl, args.seed):
            yield row | facts("check")
    if args.quick or args.impl not in ("", "hopper"):
        return
    # Last, and here: they take the GPU's whole memory, which the workers have given back.
    for name in huge.CASES:
        if args.only in name:
            yield attempt(name, huge.CASES[name], args.seed) | facts("check")


def _folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def rows_of(chosen: Iterable[Case], impl: str, seed: int) -> Iterator[dict]:
    """Yield the row of each case; what fails in any way is a row, and does not end the others."""
    with futures.ThreadPoolExecutor(COMPILERS) as pool:
        programs: dict[tuple, futures.Future] = {}

        def ready(key: tuple, compile: Callable) -> futures.Future:
            if key not in programs:
                programs[key] = pool.submit(compile)
            return programs[key]

        work = []
        for case in chosen:
            key, whole = same_program(case), basic(case)
            kernel = ready(("kernel", key), functools.partial(compile_kernel, key, impl))
            work.append((case, kernel, ready(("oracle", whole), functools.partial(compile_oracle, whole))))
        for case, kernel, oracle in work:
            yield attempt(str(case), check, case, kernel, oracle, seed)


def attempt(what: str, call: Callable[..., dict], *arguments) -> dict:
    """Return the row of a case, or of its failure."""
    begin = time.perf_counter()
    try:
        row = call(*arguments)
    except Exception as error:
        row = {"passed": False, "failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
    return {"what": what} | row | {"seconds": round(time.perf_counter() - begin, 2)}


def compile_kernel(case: Case, impl: str) -> Callable:
    """Return both passes of a case, compiled; without an implementation's name by its operation's kernels."""
    operation = OPERATIONS[case.operation]
    call = cases.through(case, operation.run(case, impl or operation.kernel))
    ids = jax.ShapeDtypeStruct(case.shape[::2], jnp.int32) if case.documents else None
    return jax.jit(both_passes(call)).lower(gradients_of(case), arrays_of(case), ids).compile()


def compile_oracle(case: Case) -> Callable:
    """Return both passes of a case's oracle, compiled; the case is a `basic` one."""
    with jax.enable_x64(True):
        wide = [
            {name: jax.ShapeDtypeStruct(x.shape, jnp.float64) for name, x in shapes(case).items()}
            for shapes in (gradients_of, arrays_of)
        ]
        ids = jax.ShapeDtypeStruct(case.shape[::2], jnp.int32)
        oracle = both_passes(OPERATIONS[case.operation].oracle(case))
        return jax.jit(oracle).lower(*wide, ids).compile({"xla_gpu_autotune_level": 0})


def check(case: Case, kernel: futures.Future, oracle: futures.Future, seed: int) -> dict:
    """Return the row of a case, given its programs."""
    kernel, oracle = kernel.result(), oracle.result()
    inputs = cases.draw(case, case.rng(seed))
    given = jax.block_until_ready(jax.device_put(inputs))
    poison(kernel)
    first = jax.device_get(kernel(*given))
    poison(kernel)
    second = jax.device_get(kernel(*given))
    with jax.enable_x64(True):
        filled = jax.device_get(oracle(*cases.complete(case, *inputs)))
    wanted = {name: comparison.cropped(filled[name], x.shape) for name, x in first.items()}
    by_token = {name: x for name, x in first.items() if x.shape[:2] == case.shape[::2]}
    least = comparison.floors(inputs[1])
    found = {
        "errors": {name: comparison.error(x, wanted[name], least.get(name, 0.0)) for name, x in first.items()},
        "rows": {name: comparison.error_of_rows(x, wanted[name], least.get(name, 0.0)) for name, x in by_token.items()},
        "finite": all(map(comparison.finite, first.values())),
        "same_bits": all(comparison.same_bits(x, second[name]) for name, x in first.items()),
    }
    return {"seed": seed} | dataclasses.asdict(case) | judged(found)


def poison(kernel: Callable) -> None:
    """Fill the memory that a call is about to be given with NaN: the allocator hands out what it got back last."""
    memory = kernel.memory_analysis()
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(kernel.out_info)]
    sizes.append(memory.temp_size_in_bytes if memory else 0)
    buffers = [np.full(size // 2 + 1, np.nan, jnp.bfloat16) for size in sizes]
    held = jax.block_until_ready([jax.device_put(x) for x in buffers for _ in range(COPIES)])
    for x in held:
        x.delete()


def worst(rows: Iterable[dict]) -> str:
    """Return the largest errors in words."""
    for_all = [(max(row["errors"].values(), default=0), row["what"]) for row in rows if "errors" in row]
    return "largest error {:.1e} ({})".format(*max(for_all)) if for_all else "nothing was compared"


def line(row: dict) -> str:
    """Return a row of the printed table."""
    start = f"{'ok  ' if row['passed'] else 'BAD '}{row['what']}"
    if "failure" in row:
        return f"{start}: {row['failure']}"
    numbers = " ".join(f"{name} {x:.1e}" for name, x in row["errors"].items())
    words = [] if row["finite"] else ["NOT FINITE"]
    words += [] if row["same_bits"] else ["OTHER BITS"]
    row_error = max(row["rows"].values(), default=0)
    return " ".join([f"{start}: {numbers} | rows {row_error:.1e}", *words, f"| {row['seconds']:.1f} s"])


def facts(name: str) -> dict:
    """Return what every row names: device, versions and command."""
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {library: importlib.metadata.version(library) for library in ("jax", "jaxlib")},
        "command": command(name),
    }


def command(name: str) -> str:
    """Return the command line; it does not wake the GPU, whose memory the workers may hold."""
    return f"python -m experiments.kernels {' '.join([name, *sys.argv[2:]])}"

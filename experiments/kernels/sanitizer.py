"""A small call of every kernel, forward and backward, under compute-sanitizer.

What is run for each tool, with XLA asking the driver for every buffer so that the tool sees where each one ends:

XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck python -m experiments.kernels sanitize --inner
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax

from based_jax.errors import UserError
from experiments.kernels import cases, check, comparison

RESULTS = Path(__file__).parent / "results"
TOOLS = "memcheck", "racecheck", "synccheck"
OPTIONS = {"memcheck": ["--report-api-errors", "no"]}
"""What libraries ask the driver for in vain is not ours."""
START = "120"
"""Seconds until the calls must have reached the tool."""
ALLOCATOR = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
MARK = "========= "
"""What the tools' own lines begin with."""
MOST_LINES = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--tools", nargs="+", default=TOOLS, help=f"default: {' '.join(TOOLS)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "sanitizer.txt", help="the tools' words; replaced")
    parser.add_argument("--limit", type=float, default=200, help="seconds for each tool (default: 200)")
    parser.add_argument("--inner", action="store_true", help="only run the calls: what the tools are given")


def run(args: argparse.Namespace) -> int:
    """Run the calls under each tool, or alone; return 0 if no tool found anything."""
    if args.inner:
        return call_kernels()
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise UserError("'sanitize' needs compute-sanitizer on the PATH.")
    found = [report(tool, name, args.limit) for name in args.tools]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(text for _, text in found))
    return max(code for code, _ in found)


def call_kernels() -> int:
    """Run every small case once and print its name; return 0 if what came back is finite."""
    fine = True
    print(check.facts("sanitize"), flush=True)
    for case in cases.tiny_cases():
        kernel = check.compile_kernel(case, "")
        # No seed of its own: the tools look at addresses and orders, and a finding can be seen again.
        found = jax.device_get(kernel(*jax.device_put(cases.draw(case, case.rng(0)))))
        finite = all(map(comparison.finite, found.values()))
        print(f"{'ran' if finite else 'NOT FINITE'} {case}", flush=True)
        fine &= finite
    return 0 if fine else 1


def report(tool: str, name: str, limit: float) -> tuple[int, str]:
    """Return the exit code of the calls under a tool, and what it and they said in short; print that too."""
    options = ["--tool", name, *OPTIONS.get(name, []), "--launch-timeout", START, "--error-exitcode", "9"]
    inner = ["-m", "experiments.kernels", "sanitize", "--inner"]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [tool, *options, sys.executable, *inner],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            env=os.environ | ALLOCATOR,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 1, f"{_text(error.stdout)}\nstopped after {limit:.0f} s"
    shown = " ".join([*(f"{name}={value}" for name, value in ALLOCATOR.items()), "compute-sanitizer", *options])
    ended = f"exit code {code} after {time.perf_counter() - begin:.0f} s"
    text = f"$ {shown} python {' '.join(inner)}\n{summary(output)}\n{ended}\n"
    print(text, flush=True)
    return code, text


def summary(output: str) -> str:
    """Return the calls' lines and the tool's, the first of many."""
    ours = ("ran ", "NOT FINITE ", "{'device'", "stopped ")
    lines = [line for line in output.splitlines() if line.startswith((MARK, *ours))]
    kept = lines[:MOST_LINES] + ["..."] * (len(lines) > MOST_LINES)
    last = [line for line in lines[MOST_LINES:] if "SUMMARY" in line]
    return "\n".join(kept + last) if lines else output[-2000:]


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""

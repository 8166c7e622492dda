"""A small call of every kernel, forward and backward, under compute-sanitizer.

What is run for each tool, with XLA asking the driver for every buffer so that the tool sees where each one ends:

XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck python -m based_jax bench sanitize --inner
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import jax

from based_jax.bench import cases, check, comparison, rows
from based_jax.bench.catalogue.operation import Case
from based_jax.errors import UserError

TOOL_OPTIONS = {"memcheck": ["--report-api-errors", "no"]}
"""What libraries ask the driver for in vain is not ours."""
LAUNCH_TIMEOUT = "120"
"""Seconds until the calls must have reached the tool."""
DRIVER_ALLOCATOR = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
TOOL_LINE_MARK = "========= "
"""What the tools' own lines begin with."""
MOST_SUMMARY_LINES = 120


def reports(tools: Sequence[str], limit: float) -> Iterator[tuple[int, str]]:
    """Yield for each tool the exit code of the calls under it, and what it and they said in short.

    Args:
      tools: of compute-sanitizer.
      limit: seconds for each.

    Raises:
      UserError: compute-sanitizer is missing.
    """
    path = shutil.which("compute-sanitizer")
    if path is None:
        raise UserError("'sanitize' needs compute-sanitizer on the PATH.")
    for name in tools:
        yield report(path, name, limit)


def call_kernels() -> bool:
    """Run every small case once and print its name; return whether some ran, and what came back is finite."""
    fine = []
    print(rows.facts(), flush=True)
    for case, kernel in _accepted():
        # No seed of its own: the tools look at addresses and orders, and a finding can be seen again.
        found = jax.device_get(kernel(*jax.device_put(cases.draw(case, case.rng(0)))))
        fine.append(all(map(comparison.finite, found.values())))
        print(f"{'ran' if fine[-1] else 'NOT FINITE'} {case}", flush=True)
    return bool(fine) and all(fine)


def _accepted() -> Iterator[tuple[Case, jax.stages.Compiled]]:
    """Yield the small cases and their programs; in place of one that is refused the plain call, if that is taken."""
    for small in cases.small_cases():
        for case in dict.fromkeys((small, cases.plain(small))):
            try:
                compiled = check.compile_case(case)
            except UserError as error:
                print(f"left {case}: {error}", flush=True)
                continue
            yield case, compiled
            break


def report(tool: str, name: str, limit: float) -> tuple[int, str]:
    """Return the exit code of the calls under a tool, and what it and they said in short."""
    options = ["--tool", name, *TOOL_OPTIONS.get(name, []), "--launch-timeout", LAUNCH_TIMEOUT, "--error-exitcode", "9"]
    inner = ["-m", "based_jax", "bench", "sanitize", "--inner"]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [tool, *options, sys.executable, *inner],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            env=os.environ | DRIVER_ALLOCATOR,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 1, f"{_text(error.stdout)}\nstopped after {limit:.0f} s"
    shown = " ".join([*(f"{name}={value}" for name, value in DRIVER_ALLOCATOR.items()), "compute-sanitizer", *options])
    ended = f"exit code {code} after {time.perf_counter() - begin:.0f} s"
    text = f"$ {shown} python {' '.join(inner)}\n{summary(output)}\n{ended}\n"
    return code, text


def summary(output: str) -> str:
    """Return the calls' lines and the tool's, the first of many."""
    ours = ("ran ", "left ", "NOT FINITE ", "{'device'", "stopped ")
    lines = [line for line in output.splitlines() if line.startswith((TOOL_LINE_MARK, *ours))]
    kept = lines[:MOST_SUMMARY_LINES] + ["..."] * (len(lines) > MOST_SUMMARY_LINES)
    last = [line for line in lines[MOST_SUMMARY_LINES:] if "SUMMARY" in line]
    return "\n".join(kept + last) if lines else output[-2000:]


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""

"""Where the time of a call goes: by kernel from JAX's profiler, and within each kernel from Nsight Compute.

What is run for the second, each kernel replayed for every group of its counters:

ncu --clock-control none --section ... -k regex:... -o REPORT python -m based_jax bench profile --inner FILE
ncu -i REPORT.ncu-rep --page raw --csv --print-units base
"""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from based_jax.bench import kernels
from based_jax.bench.catalogue import TimedShape, timed_case, timed_operation
from based_jax.bench.catalogue.operation import Case
from based_jax.bench.timing import breakdown
from based_jax.errors import UserError

PROFILED_SHAPES = (*kernels.TABLE_SHAPES, kernels.LENGTH_SHAPES[-1])
NO_PREALLOCATION = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The profiled process needs memory beside this one."""
CUSTOM_CALL = re.compile(r'custom_call_target="(mosaic_gpu|triton_kernel_call)')
"""A kernel of our own in a compiled program."""
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
SUSTAINED = r"\.avg\.pct_of_peak_sustained_(active|elapsed)"
METRICS = {
    "microseconds": r"gpu__time_duration\.sum",
    "tensor_percent": r"sm__(inst_executed_)?pipe_tensor.*" + SUSTAINED,
    "l1_percent": r"l1tex__throughput" + SUSTAINED,
    "l2_percent": r"lts__throughput" + SUSTAINED,
    "dram_percent": r"gpu__dram_throughput" + SUSTAINED,
    "issue_percent": r"smsp?__(issue_active|inst_issued)" + SUSTAINED,
    "warps_percent": r"sm__warps_active" + SUSTAINED,
    "registers": r"launch__registers_per_thread",
    "shared_memory_bytes": r"launch__shared_mem_per_block",
    "blocks": r"launch__grid_size",
    "threads": r"launch__block_size",
    "blocks_at_once": r"launch__occupancy_limit_\w+",
}
"""Our names, and the profiler's. Of several that match, the largest is taken, but the smallest limit."""
LEAST_PERCENT = 5.0
"""Of a unit's peak, to be listed among the units."""
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")


@dataclasses.dataclass(frozen=True)
class TimedSelection:
    """What is profiled.

    Attributes:
      names: of the benchmark.
      shapes: (B, H, T).
      impls: implementations; none for those that run kernels of our own.
    """

    names: Sequence[str]
    shapes: Sequence[TimedShape]
    impls: Sequence[str] = ()

    def calls(self) -> Iterator[tuple[str, TimedShape, str]]:
        """Yield (name, shape, implementation) of each call."""
        for name in self.names:
            operation = timed_operation(name)
            impls = operation.impls(self.impls) if self.impls else list(operation.kernels)
            yield from ((name, shape, impl) for shape in self.shapes for impl in impls)

    def kernels(self) -> str:
        """Return what the kernels' names begin with, as a regular expression."""
        tables = [timed_operation(name).kernels for name in self.names]
        return "|".join(dict.fromkeys(x for table in tables for names in table.values() for x in names))

    def words(self) -> list[str]:
        """Return the selection as arguments of the command."""
        shapes = ["x".join(map(str, shape)) for shape in self.shapes]
        return ["--ops", *self.names, "--shapes", *shapes, *(["--impls", *self.impls] if self.impls else [])]


def check_tool() -> None:
    """Raise a UserError where Nsight Compute is missing."""
    if shutil.which("ncu") is None:
        raise UserError("'profile' needs ncu on the PATH, or --no-ncu.")


def timelines(selection: TimedSelection) -> Iterator[dict]:
    """Yield for each call the median time of each of its kernels, and of the gaps between them."""
    for name, shape, impl in selection.calls():
        for which in timed_operation(name).passes:
            try:
                yield kernels.place(name, impl, shape, which) | timeline(timed_case(name, shape, impl), which)
            except Exception as error:  # the others are still worth a look
                print(f"{name} {shape} {impl} {which}: {type(error).__name__}: {str(error)[:300]}", flush=True)


def timeline(case: Case, which: str) -> dict:
    """Return where the time of a call goes."""
    sets = [kernels.given(x, which) for x in kernels.inputs(case)]
    found = breakdown(kernels.compiled(case, which), sets)
    parts = [
        {"kernel": kernel, "launches": count, "microseconds": round(time, 2)} for kernel, count, time in found.kernels
    ]
    times = {"microseconds": round(found.span, 2), "idle_microseconds": round(found.idle, 2)}
    return {"view": "call"} | times | {"kernels": parts}


def launch(selection: TimedSelection, path: Path) -> None:
    """Run all passes of each call once, and write how many kernels each launches."""
    found = []
    for name, shape, impl in selection.calls():
        case, which = timed_case(name, shape, impl), timed_operation(name).passes[-1]
        call = kernels.compiled(case, which)
        count = len(CUSTOM_CALL.findall(call.as_text() or ""))
        found.append(kernels.place(name, impl, shape, which) | {"launches": count})
        jax.block_until_ready(call(*kernels.given(kernels.inputs(case, 1)[0], which)))
        print(found[-1], flush=True)
    path.write_text(json.dumps(found))


def counters(selection: TimedSelection, keep: Path | None = None) -> list[dict]:
    """Return a row for each launch that Nsight Compute saw, with what `METRICS` names and the stalls.

    Args:
      selection: the calls.
      keep: a file for all that it says of each launch (CSV).
    """
    tool = shutil.which("ncu") or "ncu"
    with tempfile.TemporaryDirectory() as folder:
        report, calls = Path(folder) / "report", Path(folder) / "calls.json"
        options = [x for section in SECTIONS for x in ("--section", section)]
        # Not locked to a base clock: the times are to be those of the other commands.
        command = [
            tool,
            "--clock-control",
            "none",
            *options,
            "-k",
            f"regex:{selection.kernels()}",
            "-f",
            "-o",
            str(report),
        ]
        command += [sys.executable, "-m", "based_jax", "bench", "profile", *selection.words(), "--inner", str(calls)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | NO_PREALLOCATION)
        if done.returncode or not calls.exists():
            print(f"ncu failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}", flush=True)
            return []
        page = [tool, "-i", f"{report}.ncu-rep", "--page", "raw", "--csv", "--print-units", "base"]
        raw = subprocess.run(page, capture_output=True, text=True, check=True).stdout
        if keep:
            keep.write_text(raw)
        return launches(raw, json.loads(calls.read_text()))


def launches(raw: str, calls: list[dict]) -> list[dict]:
    """Return the rows of a report in CSV, each with the call that it belongs to where their numbers agree."""
    table = [row for row in csv.DictReader(io.StringIO(_from_header(raw))) if row["ID"]]
    owners = [{k: v for k, v in call.items() if k != "launches"} for call in calls for _ in range(call["launches"])]
    if len(owners) != len(table):
        print(f"{len(table)} launches were profiled and {len(owners)} expected: their shapes are unknown.", flush=True)
        owners = [{}] * len(table)
    rows = []
    for row, owner in zip(table, owners, strict=True):
        numbers = {name: x for name, text in row.items() if (x := _number(text)) is not None}
        rows.append({"view": "launch", **owner, "kernel": _plain(row["Kernel Name"]), **picked(numbers)})
    return rows


def picked(numbers: dict[str, float]) -> dict:
    """Return what `METRICS` names of a launch's numbers, the busy units, and the stalls in warps per issue."""
    found: dict = {}
    for ours, pattern in METRICS.items():
        values = [x for name, x in numbers.items() if re.fullmatch(pattern, name)]
        if values:
            found[ours] = min(values) if ours == "blocks_at_once" else max(values)
    if "microseconds" in found:
        found["microseconds"] = round(found["microseconds"] / 1e3, 2)
    units = {name: x for name, x in numbers.items() if re.search(SUSTAINED + "$", name) and x >= LEAST_PERCENT}
    stalls = {match[1]: x for name, x in numbers.items() if (match := STALL.fullmatch(name))}
    stalls = {name: x for name, x in stalls.items() if not name.endswith(("selected", "_not_issued"))}
    return found | {"stalls": _descending(stalls), "units_percent": _descending(units)}


def _descending(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(x, 3) for name, x in sorted(numbers.items(), key=lambda x: -x[1])}


def _from_header(raw: str) -> str:
    """Return the CSV without what the tool says before it."""
    lines = raw.splitlines(keepends=True)
    first = next((i for i, text in enumerate(lines) if text.startswith('"ID"')), 0)
    return "".join(lines[first:])


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _plain(kernel: str) -> str:
    """Return a kernel's name without its arguments."""
    return kernel.split("(")[0].removeprefix("void ").strip()


def line(row: dict) -> str:
    """Return a row in one line of print."""
    shape = "({batch},{heads},{seq_len})".format(**row) if "batch" in row else "-"
    if row["view"] == "call":
        times = " ".join(f"{x['kernel']}={x['microseconds']:.1f}" for x in row["kernels"])
        total, idle = (row[name] for name in ("microseconds", "idle_microseconds"))
        return f"{row['op']} {shape} {row['pass']}: {total:.1f} us, idle {idle:.1f}: {times}"
    numbers = " ".join(f"{name.removesuffix('_percent')}={row[name]:g}" for name in METRICS if name in row)
    stalls = " ".join(f"{name}={x:.2f}" for name, x in list(row["stalls"].items())[:5])
    return f"{shape} {row['kernel']}: {numbers} | stalls {stalls}"

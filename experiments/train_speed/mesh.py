"""Whole training steps over several GPUs of one host, beside one GPU that has as many tokens.

python -m experiments.train_speed.mesh run --devices=2 [--only=TEXT]    times each point; rows are appended
python -m experiments.train_speed.mesh run --devices=2 --at-once=6      compiles six at once before it times them
python -m experiments.train_speed.mesh share --devices=2                what one GPU computes of them, on one GPU
python -m experiments.train_speed.mesh compile --devices=2              estimates them ahead of time, for H200s
python -m experiments.train_speed.mesh plot                             draws them

`--only` takes a point's name: "based_1b 8 x 2,048 fsdp". What one GPU does stands under the mesh "one".
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from based_jax.bench.rows import read
from based_jax.bench.train import MOCKED_TOPOLOGY
from based_jax.pictures.tables import markdown
from experiments import commands
from experiments.train_speed import mesh_plots

FOLDER = Path(__file__).parent
ROWS, ESTIMATES = (FOLDER / "results" / name for name in ("mesh.jsonl", "mesh_ahead.jsonl"))
ONE = "one"
"""The mesh of one GPU."""
COUNTS = (2, 4, 8)
"""GPUs of which rows are shown."""
PER_DEVICE = "tokens_per_second_per_device"
LEAST_BYTES = 10e6
"""That are told, of a kind of collective."""
SAME_PROGRAM = ("config", "rows", "seq_len", "mesh", "remat")


class Size(NamedTuple):
    """What each GPU has of a step: rows of a config with so many tokens, over these axes of a mesh.

    Where rows are not divided, as over "tensor" and "sequence", a step has as many rows more as there are GPUs.
    """

    config: str
    rows: int
    seq_len: int
    axes: tuple[str, ...]
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A file's name and its variant, rows and tokens: based_1b 8 x 2,048."""
        model = "_".join(re.findall(r"(\w+)\.py:(\w+)", self.config)[0])
        return f"{model} {self.rows} x {self.seq_len:,}"


ROW_AXES, TIME_AXES = ("data", "fsdp"), ("sequence",)
BATCH_AXES = (*ROW_AXES, "tensor")
GPU_LAYERS = ("--config.model.scan_layers=False", "--config.model.remat=none")
"""What configs say by "auto" where GPUs are there, as they are not when it is compiled ahead of time."""
FULL_REMAT = ("--config.model.remat=full",)
"""What 131,072 tokens need to fit."""
SIZES = (
    Size("configs/based.py:1b", 8, 2048, BATCH_AXES),
    Size("configs/attention.py:1b", 8, 2048, BATCH_AXES),
    Size("configs/based.py:360m", 16, 2048, BATCH_AXES),
    Size("configs/based.py:1b", 1, 32768, TIME_AXES),
    Size("configs/attention.py:1b", 1, 32768, TIME_AXES),
    Size("configs/based.py:1b", 1, 131072, TIME_AXES, FULL_REMAT),
    Size("configs/attention.py:1b", 1, 131072, TIME_AXES, FULL_REMAT),
)
GOALS = {("fsdp", 2): 0.95, ("fsdp", 8): 0.9, ("sequence", 2): 0.9}
"""Weak-scaling efficiency of models of 1.3B by axis and number of GPUs."""


class Point(NamedTuple):
    """A size on one GPU (`ONE`), or on several along one axis of a mesh."""

    size: Size
    axis: str
    devices: int

    @property
    def name(self) -> str:
        """The size's with the axis."""
        return f"{self.size.name} {self.axis}"

    @property
    def goal(self) -> float | None:
        """The efficiency that it is to reach."""
        return GOALS.get((self.axis, self.devices)) if self.size.config.endswith("1b") else None

    @property
    def words(self) -> list[str]:
        """The arguments of `bench train`."""
        words = [f"--config={self.size.config}", f"--rows={self.size.rows * self.devices}"]
        words += [f"--seq-len={self.size.seq_len}", *self.size.overrides]
        return words + ([] if self.axis == ONE else [f"--config.mesh.{self.axis}={self.devices}"])

    def is_of(self, row: dict) -> bool:
        """Return whether a row is of this point, by a compiler with its defaults."""
        mesh = {} if self.axis == ONE else {self.axis: self.devices}
        size = (row["config"], row["rows"], row["seq_len"], row["mesh"])
        return (
            size == (self.size.config, self.size.rows * self.devices, self.size.seq_len, mesh)
            and not flags(row)
            and not row.get("mocked_topology")
        )

    def is_share_of(self, row: dict) -> bool:
        """Return whether a row is of what one GPU computes of this point, and nothing is exchanged."""
        return self.is_of(row | {"mocked_topology": None}) and row.get("mocked_topology") is not None


def flags(row: dict) -> str:
    """Return what a row's compiler was told besides its defaults."""
    return row.get("xla_flags", "")


def points(devices: int) -> Iterator[Point]:
    """Yield the points of so many GPUs, those of one first."""
    for size in SIZES:
        yield Point(size, ONE, 1)
    for size in SIZES if devices > 1 else ():
        yield from (Point(size, axis, devices) for axis in size.axes)


def run(devices: int, only: str, at_once: int = 1) -> int:
    """Time the points whose name has a text, each in a process of its own; return 1 if one failed.

    With several `at_once` so many are compiled side by side first, and kept; they are timed one after the other.
    """
    gpus = ",".join(map(str, range(devices)))

    def environment(point: Point) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": "0" if point.axis == ONE else gpus}

    if at_once > 1:
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda x: _bench(x, environment(x) | shared, "--compile-only"), chosen(devices, only)))
    return int(any([_bench(point, environment(point)) for point in chosen(devices, only)]))


def run_shares(devices: int, only: str) -> int:
    """Time what one GPU computes of the points of several, nothing exchanged; return 1 if one failed."""
    mocked = {MOCKED_TOPOLOGY: f"1x{devices}x1"}
    one = {"CUDA_VISIBLE_DEVICES": "0"}
    return int(any([_bench(x, one | ({} if x.axis == ONE else mocked)) for x in chosen(devices, only)]))


def chosen(devices: int, only: str) -> list[Point]:
    """Return the points whose name has a text."""
    return [point for point in points(devices) if only in point.name]


def _bench(point: Point, environment: dict[str, str], *words: str) -> int:
    """Return the exit code of `bench train` of a point in a process of its own."""
    command = [sys.executable, "-m", "based_jax", "bench", "train", f"--out={os.path.relpath(ROWS)}"]
    return subprocess.run([*command, *point.words, *words], env=os.environ | environment).returncode


def compile_ahead(devices: int, only: str) -> int:
    """Compile the points of several GPUs for H200s that need not be here, and append what `aot` estimates."""
    command = [sys.executable, "-m", "based_jax", "aot", "--program=train", f"--topology=h200:1x{devices}"]
    command += ["--whole-rows", *GPU_LAYERS, f"--out={os.path.relpath(ESTIMATES)}"]
    several = [point for point in chosen(devices, only) if point.axis != ONE]
    return int(any(subprocess.run([*command, *aot_words(point)]).returncode for point in several))


def aot_words(point: Point) -> list[str]:
    """Return the arguments of `aot` for a point."""
    rows = point.size.rows * (1 if point.axis in ROW_AXES else point.devices)
    words = [f"--config={point.size.config}", f"--mesh={point.axis}:{point.devices}", f"--rows-per-device={rows}"]
    return [*words, f"--config.data.seq_len={point.size.seq_len}", *point.size.overrides]


class Measured(NamedTuple):
    """A point, and its last rows, None where there is none.

    Attributes:
      row: of all GPUs.
      alone: of one GPU that has as many tokens.
      share: of what one GPU computes, nothing exchanged.
      estimate: ahead of time.
    """

    point: Point
    row: dict | None
    alone: dict | None
    share: dict | None
    estimate: dict | None

    @property
    def efficiency(self) -> float | None:
        """Tokens/s of a GPU over those of one alone."""
        return _ratio(self.row, self.alone)

    @property
    def bound(self) -> float | None:
        """The same if nothing that is exchanged took time."""
        return _ratio(self.share, self.alone)


def _ratio(row: dict | None, alone: dict | None) -> float | None:
    return None if row is None or alone is None else row[PER_DEVICE] / alone[PER_DEVICE]


def measured(rows: Sequence[dict], estimates: Sequence[dict] = ()) -> Iterator[Measured]:
    """Yield the points of each number of GPUs of which there is a row or an estimate."""
    for devices in COUNTS:
        for point in points(devices):
            alone = Point(point.size, ONE, 1)
            found = [_last(rows, test) for test in (point.is_of, alone.is_of, point.is_share_of)]
            x = Measured(point, *found, _estimate(estimates, point))
            if point.axis != ONE and (x.row or x.share or x.estimate):
                yield x


def _last(rows: Sequence[dict], test: Callable[[dict], bool]) -> dict | None:
    return next(filter(test, reversed(rows)), None)


def _estimate(estimates: Sequence[dict], point: Point) -> dict | None:
    """Return the last estimate of a point, which knows its config by its command."""
    words = set(aot_words(point))
    return next((x for x in reversed(estimates) if words <= set(x["command"].split())), None)


def read_rows() -> list[dict]:
    """Return the rows, behind those of single GPUs (`results/train.jsonl`), which say less."""
    single = [
        row | {"mesh": {}, PER_DEVICE: row["tokens_per_second"]}
        for row in read(ROWS.with_name("train.jsonl"))
        if row.get("devices") == 1 and row.get("documents", 1) == 1
    ]
    return [*single, *read(ROWS)]


def tables() -> dict[str, str]:
    """Return the README's tables of several GPUs by their names."""
    found = list(measured(read_rows(), read(ESTIMATES)))
    return {"mesh": table(found), "flags": flags_table(read(ROWS))}


def table(found: Sequence[Measured]) -> str:
    """Return the table of weak scaling."""
    return markdown(pd.DataFrame(list(map(_told, found)))) if found else "None has been measured."


def _told(x: Measured) -> dict[str, str]:
    return {
        "model": f"`{x.point.size.name.split()[0]}`",
        "rows x tokens a GPU": f"{x.point.size.rows} x {x.point.size.seq_len:,}",
        "mesh": f"{x.point.axis} {x.point.devices}",
        "tokens/s a GPU": _speed(x.row),
        "alone": _speed(x.alone),
        "of it": _percent(x.efficiency),
        "goal": _percent(x.point.goal),
        "if nothing were exchanged": _percent(x.bound),
        "exchange, exposed (ms)": _exchange(x.row),
        "GB sent": _sent(x.row or x.estimate or {}),
        "ahead: compute + HBM + links (ms)": _estimated(x.estimate),
        "by its schedule, exposed (ms)": _scheduled(x.estimate),
        "GiB ahead": f"{x.estimate['memory']['peak'] / (1 << 30):.1f}" if x.estimate else "",
    }


def _speed(row: dict | None) -> str:
    return f"{row[PER_DEVICE]:,.0f}" if row else "not measured"


def _percent(x: float | None) -> str:
    return "" if x is None else f"{x:.1%}"


def _exchange(row: dict | None) -> str:
    """Return how long collectives run in a step, and how long nothing else does."""
    found = ((row or {}).get("breakdown") or {}).get("exchange")
    return f"{found['milliseconds']:.1f}, {found['exposed']:.1f}" if found else ""


def _sent(row: dict) -> str:
    found = [x for x in row.get("exchanged", ()) if x["bytes"] >= LEAST_BYTES]
    return ", ".join(f"{x['kind']} {x['bytes'] / 1e9:.2f}" for x in found)


def _estimated(estimate: dict | None) -> str:
    if estimate is None:
        return ""
    return " + ".join(f"{1e3 * estimate['seconds'][name]:.0f}" for name in ("compute", "memory", "links"))


def _scheduled(estimate: dict | None) -> str:
    found = (estimate or {}).get("estimate", {})
    if "schedule_seconds" not in found:
        return ""
    return f"{1e3 * found['schedule_seconds']:.0f}, {1e3 * found['exposed_seconds']:.1f}"


def flags_table(rows: Sequence[dict]) -> str:
    """Return the table of what flags of XLA change, beside the last row without them."""
    found, rows = [], [row for row in rows if not row.get("mocked_topology")]
    for row in (row for row in rows if flags(row)):
        plain = [x for x in rows if not flags(x) and all(x[name] == row[name] for name in SAME_PROGRAM)]
        found.append(
            {
                "model": f"`{'_'.join(re.findall(r'(\w+)\.py:(\w+)', row['config'])[0])}`",
                "rows x tokens": f"{row['rows']} x {row['seq_len']:,}",
                "mesh": ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or ONE,
                "flags": f"`{flags(row)}`",
                "ms": f"{row['milliseconds']:.1f}",
                "without": f"{plain[-1]['milliseconds']:.1f}" if plain else "",
                "exchange, exposed (ms)": _exchange(row),
            }
        )
    return markdown(pd.DataFrame(found)) if found else "None has been tried."


def draw() -> list[Path]:
    """Draw the picture and return its files."""
    found = [x for x in measured(read_rows()) if x.efficiency is not None]
    bars = [mesh_plots.Bar(x.point.name, x.point.devices, x.efficiency, x.point.goal) for x in found]
    return mesh_plots.draw(bars, {row["device"] for row in read(ROWS)}, FOLDER / "results" / "mesh")


TIMED = {"share": run_shares, "compile": compile_ahead}


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", *TIMED, "plot"))
    parser.add_argument("--devices", type=int, default=2, help="GPUs of a mesh (default: 2)")
    parser.add_argument("--only", default="", help="the points whose name has this text")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="compiled side by side (default: 1)")
    args = parser.parse_args()
    if not chosen(args.devices, args.only):
        found = ", ".join(point.name for point in points(args.devices))
        parser.error(f"no point of {args.devices} GPUs has '{args.only}' in its name; they are {found}.")
    if args.command == "run":
        return run(args.devices, args.only, args.at_once)
    if args.command in TIMED:
        return TIMED[args.command](args.devices, args.only)
    return commands.drawn(draw)


if __name__ == "__main__":
    sys.exit(main())

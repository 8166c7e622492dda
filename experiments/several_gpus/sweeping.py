"""The sweep engine on one GPU and on several: points an hour, by each launcher.

Both train the same points into empty stores with as many processes a GPU, and compile all of them anew.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from based_jax.bench import rows as bench_rows
from based_jax.store import Store
from experiments.several_gpus import runs

OUT = "sweep.jsonl"
LAUNCHERS = "local", "ray"
SWEEP = "experiments/several_gpus/points.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    runs.add_arguments(parser, OUT)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="default: local")
    parser.add_argument("--per-gpu", type=int, default=4, metavar="N", help="processes of each GPU (default: 4)")
    parser.add_argument("--sweep", default=SWEEP, help=f"default: {SWEEP}")


def run(args: argparse.Namespace) -> int:
    """Run the sweep on one GPU and on all, and append a row for each; return 1 if one failed."""
    folder, codes = runs.new_folder(args.folder), []
    with bench_rows.appended(args.out) as write:
        for devices in dict.fromkeys((1, args.devices)):
            row = _measured(args, devices, folder / f"store_{devices}")
            write(row)
            codes.append(row["code"])
            told = f"{row['points']} points in {row['seconds']:.0f} s, {row['points_per_hour']:.0f} an hour"
            print(f"{devices} GPUs, {args.launcher}: {told}", flush=True)
    return int(any(codes))


def _measured(args: argparse.Namespace, devices: int, store: Path) -> dict:
    tasks = devices * args.per_gpu
    spread = [f"--processes={tasks}"] if args.launcher == "local" else ["--launcher=ray", f"--tasks={devices}"]
    words = ["sweep", "run", args.sweep, f"--store={store}", "--compiled=none", *spread]
    environment = os.environ | runs.environment(range(devices), args.devices)
    begin = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "based_jax", *words], env=environment).returncode
    seconds, found = time.perf_counter() - begin, Store(store).rows()
    return {
        "sweep": args.sweep,
        "launcher": args.launcher,
        "devices": devices,
        "processes": tasks if args.launcher == "local" else devices,
        "points": len(found),
        "seconds": round(seconds, 1),
        "points_per_hour": 3600 * len(found) / seconds,
        "code": code,
        "device": found[0].get("device", "unknown") if found else "unknown",
        **bench_rows.origin(),
    }


def table(found: Sequence[dict]) -> list[dict[str, str]]:
    """Return the cells of rows, each beside the last one of one GPU by the same launcher."""
    cells = []
    for row in found:
        alone = [
            x for x in found if x["devices"] == 1 and (x["launcher"], x["sweep"]) == (row["launcher"], row["sweep"])
        ]
        share = row["points_per_hour"] / (alone[-1]["points_per_hour"] * row["devices"]) if alone else None
        cells.append(
            {
                "launcher": row["launcher"],
                "GPUs": str(row["devices"]),
                "processes": str(row["processes"]),
                "points": str(row["points"]),
                "points an hour": f"{row['points_per_hour']:,.0f}",
                "of one GPU's times their number": f"{share:.1%}" if share else "",
                "device": row["device"],
            }
        )
    return cells

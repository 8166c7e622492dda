"""One process for each GPU through --distributed: one is killed, all begin again, and feed what they would have fed.

Each process writes down the digest of every batch that it feeds. An unbroken run beside it says what these should be.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from based_jax.bench import rows as bench_rows
from based_jax.errors import UserError
from experiments.several_gpus import runs

OUT = "processes.jsonl"
CONFIG = "configs/based.py:360m"
SECONDS_TO_END = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    runs.add_arguments(parser, OUT)
    parser.add_argument("--config", default=CONFIG, help=f"of a run on text (default: {CONFIG})")
    parser.add_argument("--rows", type=int, default=8, help="of a batch (default: 8)")
    parser.add_argument("--steps", type=int, default=60, help="default: 60")
    parser.add_argument("--kill-after", type=int, default=35, help="the step that the killed run reaches (default: 35)")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints (default: 20)")
    parser.add_argument("--axis", default="fsdp", help="of the mesh (default: fsdp)")
    parser.add_argument("overrides", nargs="*", help="of the config, as --config.a.b=value behind --")


def run(args: argparse.Namespace) -> int:
    """Run both, compare them and append a row; return 1 where something differs."""
    folder = runs.new_folder(args.folder)
    whole = _begun(args, folder / "whole")
    if any(codes := _ended(whole)):
        raise UserError(f"The unbroken run in '{folder}' ended with codes {codes}; its logs say why.")
    broken = _begun(args, folder / "broken")
    _wait_for_step(broken, folder / "broken", args.kill_after)
    broken[-1].send_signal(signal.SIGKILL)
    killed = _ended(broken)
    again = _ended(_begun(args, folder / "broken", "again"))
    row = _row(args, folder, {"whole": codes, "killed": killed, "again": again})
    with bench_rows.appended(args.out) as write:
        write(row)
    print(json.dumps({key: row[key] for key in ("codes", "said", "batches_alike", "batches", "largest_difference")}))
    return int(not row["batches_alike"] or codes + again != [0] * 2 * args.devices)


def _begun(args: argparse.Namespace, workdir: Path, name: str = "first") -> list[subprocess.Popen]:
    """Begin one process for each device, as torchrun would."""
    port = runs.free_port()
    values = {"steps": args.steps, "batch_size": args.rows, "microbatches": 1, "log_every": 1}
    values |= {f"mesh.{args.axis}": args.devices, "checkpoint.every": args.every}
    values |= {"optim.schedule": "constant", "optim.warmup_steps": 10}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    words = ["train", f"--config={args.config}", f"--workdir={workdir}", "--distributed", *overrides, *args.overrides]
    found = []
    for i in range(args.devices):
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(args.devices)}
        place |= {"RANK": str(i), "LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": str(args.devices)}
        log = workdir.with_name(f"{workdir.name}_{name}_{i}.log")
        fed = workdir.with_name(f"{workdir.name}_{name}_{i}.jsonl")
        command = [sys.executable, "-m", "experiments.several_gpus.fed", str(fed), *words]
        environment = os.environ | runs.environment([i], args.devices) | place
        with log.open("w") as file:
            found.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    return found


def _ended(processes: Sequence[subprocess.Popen]) -> list[int]:
    """Return the exit codes, when all have ended."""
    return [process.wait() for process in processes]


def _wait_for_step(processes: Sequence[subprocess.Popen], workdir: Path, step: int) -> None:
    """Wait until a run has come to a step; UserError where it has ended before."""
    while max(runs.losses(workdir), default=0) < step:
        if any(process.poll() is not None for process in processes):
            raise UserError(f"The run in '{workdir}' ended before step {step}; its log says why.")
        time.sleep(0.05)


def _row(args: argparse.Namespace, folder: Path, codes: dict[str, list[int]]) -> dict:
    """Return what was fed and learned in both runs."""
    expected, found = ([_fed(folder, run, i) for i in range(args.devices)] for run in ("whole_first", "broken_again"))
    compared = [
        expected[i].get(step) == digest for i in range(args.devices) for step, digest in sorted(found[i].items())
    ]
    whole, broken = (runs.losses(folder / name) for name in ("whole", "broken"))
    differences = [abs(broken[step] - whole[step]) for step in whole if step in broken]
    return {
        "mesh": {args.axis: args.devices},
        "processes": args.devices,
        "codes": codes,
        "said": _last_line(folder / "broken_first_0.log"),
        "killed_after": args.kill_after,
        "went_on_after": min(found[0], default=0),
        "batches": len(compared),
        "batches_alike": bool(compared) and all(compared),
        "steps": len(broken),
        "largest_difference": max(differences, default=None),
        "config": args.config,
        "rows": args.rows,
        "devices": args.devices,
        **runs.facts(folder / "whole"),
        **bench_rows.origin(),
    }


def _fed(folder: Path, run: str, process: int) -> dict[int, str]:
    """Return the digests of what a process has fed, by the steps before."""
    return {row["step"]: row["sha256"] for row in bench_rows.read(folder / f"{run}_{process}.jsonl")}


def _last_line(log: Path) -> str:
    return (log.read_text().splitlines() or [""])[-1]


def table(found: Sequence[dict]) -> list[dict[str, str]]:
    """Return the cells of rows."""
    return [
        {
            "processes": f"{row['processes']}, one a GPU",
            "mesh": ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()),
            "killed after step": str(row["killed_after"]),
            "the other said": row["said"],
            "went on after step": str(row["went_on_after"]),
            "batches fed again, bitwise alike": f"{row['batches']}, {'all' if row['batches_alike'] else 'NOT all'}",
            "largest difference of a loss": f"{row['largest_difference']:.1e}" if row["largest_difference"] else "0",
            "device": row["device"],
        }
        for row in found
    ]

"""The same run by layouts: losses beside those of one GPU, and checkpoints that go on with another layout.

Each layout trains the same batches. What one GPU makes of them in two microbatches, whose sums have another order, says
how far numbers in bf16 differ by themselves. Then runs that were saved go on where they were, and on another layout.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from based_jax.bench import rows as bench_rows
from experiments.several_gpus import runs

OUT = "layouts.jsonl"
AXES = "data", "fsdp", "tensor", "sequence"
ONE, NOISE = "one", "one, 2 microbatches"
MORE_STEPS = 10
"""That a saved run goes on for."""
LEARNING_RATE = 1e-4
"""Low for batches of so few rows: at the config's 8e-4 two runs that differ by rounding alone were 0.15 apart by step
50, and what a layout does wrong could hide in that.
"""
CONFIG = "configs/based.py:360m"


class Layout(NamedTuple):
    """A name, the devices by axis of its mesh, and its microbatches."""

    name: str
    mesh: Mapping[str, int]
    microbatches: int = 1

    @property
    def devices(self) -> int:
        """How many it takes."""
        return max(self.mesh.values(), default=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    runs.add_arguments(parser, OUT)
    parser.add_argument("--config", default=CONFIG, help=f"of a run on text (default: {CONFIG})")
    parser.add_argument("--rows", type=int, default=8, help="of a batch (default: 8)")
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    parser.add_argument("overrides", nargs="*", help="of the config, as --config.a.b=value behind --")


def run(args: argparse.Namespace) -> int:
    """Train, go on, and append a row for each; return 1 if one failed."""
    folder, several = runs.new_folder(args.folder), args.devices
    layouts = [Layout(ONE, {}), Layout(NOISE, {}, 2), *(Layout(f"{x} {several}", {x: several}) for x in AXES)]
    with ThreadPoolExecutor(args.at_once) as pool, bench_rows.appended(args.out) as write:
        failures = []
        trained = pool.map(lambda x: _trained(args, x, folder / _file(x.name), args.steps), layouts)
        for layout, failure in zip(layouts, trained, strict=True):
            write(_told(_row(args, layout, folder, failure)))
            failures.append(failure)
        fsdp = next(layout for layout in layouts if "fsdp" in layout.mesh)
        pairs = [(layouts[0], layouts[0]), (fsdp, fsdp), (fsdp, layouts[0]), (layouts[0], fsdp)]
        went_on = pool.map(lambda pair: _goes_on(args, folder, *pair), pairs)
        for (saved, restored), failure in zip(pairs, went_on, strict=True):
            write(_told(_restored(args, folder, saved, restored, failure)))
            failures.append(failure)
    return int(any(failures))


def _file(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def _words(args: argparse.Namespace, layout: Layout, workdir: Path, steps: int) -> list[str]:
    values = {"steps": steps, "batch_size": args.rows, "microbatches": layout.microbatches, "log_every": 1}
    values |= {"optim.schedule": "constant", "optim.warmup_steps": 10, "optim.lr": LEARNING_RATE}
    values |= {f"mesh.{axis}": size for axis, size in layout.mesh.items()}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    return ["train", f"--config={args.config}", f"--workdir={workdir}", *overrides, *args.overrides]


def _trained(args: argparse.Namespace, layout: Layout, workdir: Path, steps: int) -> str | None:
    """Train to a step, and return what went wrong, or None."""
    log = workdir.with_suffix(f".{steps}.log")
    environment = runs.environment(range(layout.devices), args.devices)
    try:
        runs.done(runs.begun(_words(args, layout, workdir, steps), environment, log), log)
    except RuntimeError as error:
        return str(error)
    return None


def _goes_on(args: argparse.Namespace, folder: Path, saved: Layout, restored: Layout) -> str | None:
    """Go on with a copy of a run by a layout, and return what went wrong, or None."""
    workdir = folder / _of_pair(saved, restored)
    shutil.copytree(folder / _file(saved.name), workdir)
    return _trained(args, restored, workdir, args.steps + MORE_STEPS)


def _of_pair(saved: Layout, restored: Layout) -> str:
    return _file(f"{saved.name} to {restored.name}")


def _row(args: argparse.Namespace, layout: Layout, folder: Path, failure: str | None) -> dict:
    found, alone = (runs.losses(folder / _file(name)) for name in (layout.name, ONE))
    row = {"what": "layout", "layout": layout.name, "mesh": dict(layout.mesh), "microbatches": layout.microbatches}
    return {**row, **_compared(found, alone), **_facts(args, folder / _file(layout.name), failure)}


def _restored(args: argparse.Namespace, folder: Path, saved: Layout, restored: Layout, failure: str | None) -> dict:
    """Return the row of a run that went on, beside the same that went on where it was saved."""
    found, same = (runs.losses(folder / _of_pair(saved, layout)) for layout in (restored, saved))
    later = {step: loss for step, loss in found.items() if step > args.steps}
    row = {"what": "restored", "saved": saved.name, "restored": restored.name}
    return {**row, **_compared(later, same), **_facts(args, folder / _of_pair(saved, restored), failure)}


def _compared(found: Mapping[int, float], expected: Mapping[int, float]) -> dict:
    """Return losses by step, and how far they are from others at the same steps."""
    differences = [abs(loss - expected[step]) for step, loss in found.items() if step in expected]
    return {
        "steps": sorted(found),
        "losses": [found[step] for step in sorted(found)],
        "largest_difference": max(differences, default=None),
        "last_difference": differences[-1] if differences else None,
    }


def _facts(args: argparse.Namespace, workdir: Path, failure: str | None) -> dict:
    found = {"config": args.config, "rows": args.rows, "devices": args.devices, **runs.facts(workdir)}
    return {**found, **({"failure": failure} if failure else {}), **bench_rows.origin()}


def _told(row: dict) -> dict:
    name = row.get("layout") or f"{row['saved']} to {row['restored']}"
    shown = {key: row[key] for key in ("largest_difference", "last_difference")}
    print(f"{name}: {json.dumps(shown)} {row['losses'][-1:]} {row.get('failure', '')}", flush=True)
    return row


def table(found: Sequence[dict]) -> list[dict[str, str]]:
    """Return the cells of rows: layouts, then what was restored."""
    cells = []
    for row in found:
        name = row["layout"] if row["what"] == "layout" else f"saved on {row['saved']}, restored on {row['restored']}"
        cells.append(
            {
                "run": name,
                "steps": f"{row['steps'][0]} to {row['steps'][-1]}" if row["steps"] else "none",
                "loss at the end": f"{row['losses'][-1]:.4f}" if row["losses"] else row.get("failure", ""),
                "largest difference": _number(row["largest_difference"]),
                "at the end": _number(row["last_difference"]),
                "device": row["device"],
            }
        )
    return cells


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}" if x else "0"

"""Whole training steps of the language models on one GPU, beside what they are to reach and beside other libraries.

python -m experiments.train_speed run [--only=TEXT] [--peers]    times each point; rows are appended
python -m experiments.train_speed table                          writes the README's tables from the rows
python -m experiments.train_speed plot                           draws them

`python -m experiments.train_speed.operations` times single operations, `.mesh` steps over several GPUs, `.links` what
these exchange.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from based_jax.bench.rows import read
from based_jax.pictures.tables import filled, markdown
from experiments import commands
from experiments.train_speed import links, mesh, operations, plots

FOLDER = Path(__file__).parent
ROWS, README = FOLDER / "results" / "train.jsonl", FOLDER / "README.md"
GIB = 1 << 30
LEAST_MILLISECONDS = 0.5
"""That are told."""


class Point(NamedTuple):
    """A config, the rows and tokens of its step, and the tokens/s that it is to reach."""

    config: str
    rows: int
    seq_len: int
    goal: int

    @property
    def name(self) -> str:
        """A file's name and its variant: based_1b."""
        return "_".join(re.findall(r"(\w+)\.py:(\w+)", self.config)[0])

    def is_of(self, row: dict) -> bool:
        """Return whether a row is of this point."""
        return (row["config"], row["rows"], row["seq_len"]) == self[:3] and row.get("documents", 1) == 1


POINTS = (
    Point("configs/attention.py:1b", 8, 2048, 63_000),
    Point("configs/attention.py:1b", 2, 8192, 45_000),
    Point("configs/attention.py:360m", 16, 2048, 193_000),
    Point("configs/based.py:1b", 8, 2048, 68_000),
    Point("configs/based.py:1b", 2, 8192, 64_600),
    Point("configs/based.py:1b", 1, 32768, 64_600),
    Point("configs/based.py:360m", 16, 2048, 225_000),
    Point("configs/mamba.py:1b", 8, 2048, 45_000),
    Point("configs/gated_deltanet.py:360m", 16, 2048, 175_000),
    Point("configs/gla.py:360m", 16, 2048, 180_000),
    Point("configs/rwkv.py:360m", 16, 2048, 120_000),
    Point("configs/gated_deltanet.py:1b", 8, 2048, 43_000),
    Point("configs/kda.py:1b", 8, 2048, 35_000),
    Point("configs/mamba2.py:1b", 8, 2048, 39_000),
    Point("configs/rwkv7.py:1b", 8, 2048, 28_500),
)
"""Goals: for the last four the best that a JAX library publishes for an H100, see README.md; of Based with long
sequences 95 % of that with 2,048 tokens."""


def run(only: str, with_peers: bool) -> int:
    """Time the points whose name has a text, and the peers, each in a process of its own; return 1 if one failed."""
    command = [sys.executable, "-m", "based_jax", "bench", "train", f"--out={os.path.relpath(ROWS)}"]
    tasks = [
        [f"--config={point.config}", f"--rows={point.rows}", f"--seq-len={point.seq_len}"]
        for point in POINTS
        if only in point.name
    ]
    codes = [subprocess.run([*command, *task]).returncode for task in [*tasks, *([["--peers"]] if with_peers else [])]]
    return int(any(codes))


def devices(rows: Sequence[dict]) -> list[str]:
    """Return the devices of the rows that are shown."""
    return [row["device"] for row in [*(row for _, row in measured(rows) if row), *peers(rows)]]


def measured(rows: Sequence[dict]) -> Iterator[tuple[Point, dict | None]]:
    """Yield each point with its last row, or None."""
    for point in POINTS:
        found = [row for row in rows if ":" in row["config"] and point.is_of(row)]
        yield point, found[-1] if found else None


def peers(rows: Sequence[dict]) -> list[dict]:
    """Return the last row of each model of another library."""
    return list({row["config"]: row for row in rows if row["config"].startswith(("jla:", "fla:"))}.values())


def write_tables() -> None:
    """Write the README's tables."""
    rows = read(ROWS)
    tables = {"models": models_table(rows), "times": times_table(rows), "peers": peers_table(rows)}
    tables |= {"operations": operations.table(read(operations.ROWS)), "links": links.table(read(links.ROWS))}
    tables |= mesh.tables()
    README.write_text(filled(README.read_text(), tables))


def draw() -> list[Path]:
    """Draw the picture and return its files."""
    rows = read(ROWS)
    return plots.draw(plots.bars(measured(rows), peers(rows)), devices(rows), FOLDER / "results" / "speed")


def models_table(rows: Sequence[dict]) -> str:
    """Return the table of the package's models."""
    return markdown(pd.DataFrame([_told(point, row) for point, row in measured(rows)]))


def _told(point: Point, row: dict | None) -> dict[str, str]:
    goal = {"goal, tokens/s": f"{point.goal:,}"}
    cells = {"model": f"`{point.name}`", "rows x tokens": f"{point.rows} x {point.seq_len:,}"}
    if row is None:
        return cells | {"tokens/s": "not measured"} | goal
    return (
        cells
        | {"tokens/s": f"{row['tokens_per_second']:,.0f}"}
        | goal
        | {"of it": f"{row['tokens_per_second'] / point.goal:.0%}"}
        | {name.upper(): f"{row[name]:.1%}" for name in ("mfu", "hfu", "mbu") if name in row}
        | {"recomputes": row["remat"], "GiB at most": _gib(row), "s to compile": _compile_seconds(row)}
        | {"idle, copies (ms of a step)": _gaps(row)}
        | {"clock, power": _clock(row), "device": row["device"]}
    )


def _compile_seconds(row: dict) -> str:
    """Return them, nothing of a program that was read from the disk."""
    return "" if row.get("compiled_before") else f"{row['compile_seconds']:.0f}"


def _gaps(row: dict) -> str:
    found = row["breakdown"]
    return f"{found['idle']:.1f}, {found['copies']:.1f} of {found['milliseconds']:.0f}" if found else ""


def _clock(row: dict) -> str:
    return f"{row['sm_clock_mhz']:,.0f} MHz, {row['watts']:.0f} W" if "watts" in row else ""


def times_table(rows: Sequence[dict]) -> str:
    """Return the table of where steps' time goes: by sort of kernel, then by kind of layer, of rows that tell it."""
    found = [
        {
            "model": f"`{point.name}`",
            "rows x tokens": f"{point.rows} x {point.seq_len:,}",
            "ms of a step": f"{row['breakdown']['milliseconds']:.0f}",
            "by sort of kernel": _times(row["breakdown"]["sorts"]),
            "by layer": _times({layer: sum(x.values()) for layer, x in row["breakdown"]["layers"].items()}),
        }
        for point, row in measured(rows)
        if row and row["breakdown"] and "sorts" in row["breakdown"]
    ]
    return markdown(pd.DataFrame(found)) if found else "None has been measured."


def _times(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {x:.1f}" for name, x in milliseconds.items() if x >= LEAST_MILLISECONDS)


def peers_table(rows: Sequence[dict]) -> str:
    """Return the table of the other libraries' models."""
    found = [
        {
            "model": f"`{row['config']}`",
            "rows x tokens": f"{row['rows']} x {row['seq_len']:,}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "GiB at most": _gib(row),
            "recomputes": row["remat"],
            "device": row["device"],
        }
        for row in peers(rows)
    ]
    return markdown(pd.DataFrame(found)) if found else "None has been measured."


def _gib(row: dict) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.1f}"


if __name__ == "__main__":
    sys.exit(commands.main(__doc__, run, write_tables, draw))

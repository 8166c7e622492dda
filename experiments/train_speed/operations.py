"""Operations at the shapes of whole models, beside what they are to take.

python -m experiments.train_speed.operations    times them on a GPU; rows are appended to results/operations.jsonl
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from based_jax.bench.catalogue.operation import BOTH, FORWARD
from based_jax.pictures.tables import markdown

ROWS = Path(__file__).parent / "results" / "operations.jsonl"


class Timed(NamedTuple):
    """An operation, its (B, H, T) and dims, by which implementations, and the microseconds that it is to take.

    Attributes:
      model: whose it is.
      goal: of the forward pass, and of both passes together, where they have one.
    """

    model: str
    op: str
    shape: tuple[int, ...]
    impls: tuple[str, ...]
    goal: tuple[int | None, int | None]

    @property
    def words(self) -> list[str]:
        """What `bench kernels` is told."""
        return ["--ops", self.op, "--shapes", "x".join(map(str, self.shape)), "--impls", *self.impls]

    def is_of(self, row: dict) -> bool:
        """Return whether a row is of this operation."""
        shape = (row["batch"], row["heads"], row["seq_len"], *row.get("dims", ()))
        return row["op"] == self.op and shape == self.shape and row["impl"] in self.impls


ATTENTION = ("cudnn_flash", "hopper_tiles", "hopper_turns")
CHUNKS = ("triton_chunks",)
BOTH_CHUNKS = ("hopper_chunks", *CHUNKS)
TIMED = (
    Timed("Based", "taylor_attention", (8, 16, 2048, 16, 112), ("hopper_chunks",), (100, 330)),
    Timed("attention, heads of 70 that models fill up", "attention", (8, 24, 2048, 80, 80), ATTENTION, (370, 1400)),
    Timed("the same, filled up around the kernels", "attention", (8, 24, 2048, 70, 70), ATTENTION, (370, 1400)),
    Timed("attention, heads of 64", "attention", (8, 24, 2048, 64, 64), ATTENTION, (None, None)),
    Timed("Gated DeltaNet 1.3B", "gated_delta_rule", (8, 16, 2048, 128, 128), BOTH_CHUNKS, (200, 780)),
    Timed("Gated DeltaNet 360M", "gated_delta_rule", (8, 4, 2048, 256, 512), BOTH_CHUNKS, (230, 1500)),
    Timed("KDA", "delta_rule", (8, 16, 2048, 128, 128), BOTH_CHUNKS, (620, 2900)),
    Timed("simple GLA, Mamba-2", "simple_gla", (8, 32, 2048, 128, 64), CHUNKS, (125, 690)),
    Timed("the same, one long sequence", "simple_gla", (1, 16, 16384, 128, 64), CHUNKS, (200, None)),
    Timed("RWKV-7", "dplr", (8, 16, 2048, 64, 64), BOTH_CHUNKS, (400, 1400)),
    Timed("Mamba, 32 times 64 channels", "raw_selective_scan", (8, 32, 2048, 16), ("hopper_steps",), (300, 1000)),
)


def run() -> int:
    """Time them all, each in a process of its own; return 1 if one failed."""
    command = [sys.executable, "-m", "based_jax", "bench", "kernels", f"--out={os.path.relpath(ROWS)}"]
    return int(any([subprocess.run([*command, *timed.words]).returncode for timed in TIMED]))


def table(rows: Sequence[dict]) -> str:
    """Return the table of their last rows."""
    found = [_told(timed, impl, rows) for timed in TIMED for impl in timed.impls]
    return markdown(pd.DataFrame(found))


def _told(timed: Timed, impl: str, rows: Sequence[dict]) -> dict[str, str]:
    times = {row["pass"]: row for row in rows if timed.is_of(row) and row["impl"] == impl and "error" not in row}
    return {
        "of": timed.model,
        "operation": f"`{timed.op}`",
        "(B, H, T, dims)": f"({', '.join(f'{x:,}' for x in timed.shape)})",
        "by": f"`{impl}`",
        "us, forward / both passes": " / ".join(_microseconds(times)) or "not measured",
        "goal": " / ".join(f"{x:,}" for x in timed.goal if x),
        "floor": " / ".join(f"{row['floor_microseconds']:,.0f}" for row in _in_order(times)),
    }


def _microseconds(times: dict[str, dict]) -> list[str]:
    return [f"{row['microseconds']:,.0f}" for row in _in_order(times)]


def _in_order(times: dict[str, dict]) -> Iterator[dict]:
    return (times[which] for which in (FORWARD, BOTH) if which in times)


if __name__ == "__main__":
    sys.exit(run())

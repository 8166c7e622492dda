"""The committed rows, as the tables and pictures need them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
KEY = "op", "impl", "pass", "batch", "heads", "seq_len"
FORWARD, BOTH = PASSES = "forward", "forward+backward"

HEADS = 16
TOKENS = 1 << 14
"""Of a batch, in the benchmark's sets."""
CROSSOVER = 1024
"""Tokens up to which the sets of short sequences go, and from which on those of long ones do."""

OLD_CHECKS = {
    "delta_rule": ("dplr", "hopper"),
    "delta_rule_by_chunks": ("dplr", "triton"),
    "gated_linear_attention_by_chunks": ("gated_linear_attention", "triton"),
    "gated_delta_rule": ("gated_delta_rule", "triton"),
    "simple_gla": ("simple_gla", "triton"),
}
"""What the names of checks stood for that name no implementation; all others are Hopper's."""

Place = tuple[str, str, str, int, int, int]
Shape = tuple[int, int, int]


def read(folder: Path, pattern: str) -> list[dict]:
    """Return the rows of the files that match, in the order of their names."""
    return [json.loads(text) for path in sorted(folder.glob(pattern)) for text in path.read_text().splitlines()]


def measured(folder: Path, pattern: str = "bench*.jsonl") -> dict[Place, dict]:
    """Return the benchmark's rows that have a time, by `KEY`; the last of several."""
    return {tuple(row[name] for name in KEY): row for row in read(folder, pattern) if "microseconds" in row}


def time_of(rows: dict[Place, dict], op: str, impl: str, which: str, shape: Shape) -> float | None:
    """Return the microseconds of a call, if it was measured."""
    row = rows.get((op, impl, which, *shape))
    return row and row["microseconds"]


def floor_of(rows: dict[Place, dict], op: str, which: str, shape: Shape) -> float | None:
    """Return the floor of a call, from any implementation's row."""
    found = [row["floor_microseconds"] for row in rows.values() if where(row) == shape and what(row) == (op, which)]
    return found[0] if found else None


def checked(row: dict) -> tuple[str, str]:
    """Return the operation and the implementation of a row of the check, whether it passed or not."""
    words = row["what"].split()
    if words[-1].startswith("impl="):
        return words[0], words[-1].removeprefix("impl=")
    return OLD_CHECKS.get(words[0], (words[0], "hopper"))


def where(row: dict) -> Shape:
    """Return (B, H, T)."""
    return row["batch"], row["heads"], row["seq_len"]


def what(row: dict) -> tuple[str, str]:
    """Return the operation and the pass."""
    return row["op"], row["pass"]


def made_by(rows: Iterable[dict]) -> str:
    """Return the devices and versions that rows name, in words."""
    rows = [row for row in rows if "device" in row]
    devices = dict.fromkeys(row["device"] for row in rows)
    versions = dict.fromkeys(f"{name} {version}" for row in rows for name, version in row["versions"].items())
    return f"{' and '.join(devices)}; {', '.join(versions)}"


def lengths(rows: dict[Place, dict]) -> list[Shape]:
    """Return the shapes of Taylor attention with TOKENS in a batch, or one row that is longer, by T."""
    found = {where(row) for row in rows.values() if row["op"] == "taylor_attention" and row["heads"] == HEADS}
    return sorted((x for x in found if x[0] * x[2] == TOKENS or (x[0] == 1 and x[2] > TOKENS)), key=lambda x: x[2])


def batches(rows: dict[Place, dict], time: int) -> list[Shape]:
    """Return the shapes of Taylor attention with T tokens, by B H."""
    found = {where(row) for row in rows.values() if row["op"] == "taylor_attention" and row["seq_len"] == time}
    return sorted(found, key=lambda x: x[0] * x[1])


def best(values: Sequence[float | None]) -> float | None:
    """Return the smallest of what was measured."""
    return min((x for x in values if x is not None), default=None)

"""The committed rows, as the tables and pictures need them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from based_jax.bench.catalogue.operation import Shape
from based_jax.bench.kernels import BATCH_TOKENS

FOLDER = Path(__file__).parent / "results"
ROW_KEY = "op", "impl", "pass", "batch", "heads", "seq_len"

TIMED_HEADS = 16
"""Of the benchmark's sets."""
LONGEST_SHORT_TOKENS = 1024
"""Tokens up to which the sets of short sequences go, and from which on those of long ones do."""

WINDOW_IMPLS = {"hopper": "hopper_tiles", "cudnn": "cudnn_flash", "xla": "xla_bands"}
CONVOLUTION_IMPLS = {"hopper": "hopper_taps", "xla": "xla_taps"}
NORM_IMPLS = {"hopper": "hopper_rows", "xla": "xla_rows"}
MATRIX_STATE_IMPLS = {"hopper": "hopper_steps", "triton": "triton_chunks", "xla": "xla_chunks"}
OLD_IMPLS: dict[str, dict[str, str]] = {
    "taylor_attention": {"hopper": "hopper_chunks", "xla": "xla_chunks", "quadratic": "xla_quadratic"},
    "attention": {"cudnn": "cudnn_flash"},
    "window_attention_64": WINDOW_IMPLS,
    "window_attention_128": WINDOW_IMPLS,
    "gated_short_conv": CONVOLUTION_IMPLS,
    "short_conv": CONVOLUTION_IMPLS,
    "residual_rms_norm": NORM_IMPLS,
    "residual_layer_norm": NORM_IMPLS,
    "gated_linear_attention": MATRIX_STATE_IMPLS,
    "simple_gla": MATRIX_STATE_IMPLS,
    "delta_rule": MATRIX_STATE_IMPLS,
    "gated_delta_rule": MATRIX_STATE_IMPLS,
}
"""What implementations are called that the first rows name by their backend alone."""
OLD_CHECKS = {
    "taylor_attention": ("taylor_attention", "hopper_chunks"),
    "window_attention": ("window_attention", "hopper_tiles"),
    "gated_short_conv": ("gated_short_conv", "hopper_taps"),
    "short_conv": ("short_conv", "hopper_taps"),
    "residual_rms_norm": ("residual_rms_norm", "hopper_rows"),
    "residual_layer_norm": ("residual_layer_norm", "hopper_rows"),
    "rms_norm": ("rms_norm", "hopper_rows"),
    "layer_norm": ("layer_norm", "hopper_rows"),
    "selective_scan": ("selective_scan", "hopper_steps"),
    "linear_cross_entropy": ("linear_cross_entropy", "hopper_tiles"),
    "gated_linear_attention": ("gated_linear_attention", "hopper_steps"),
    "gated_linear_attention_by_chunks": ("gated_linear_attention", "triton_chunks"),
    "simple_gla": ("simple_gla", "triton_chunks"),
    "gated_delta_rule": ("gated_delta_rule", "triton_chunks"),
    "delta_rule": ("dplr", "hopper_steps"),
    "delta_rule_by_chunks": ("dplr", "triton_chunks"),
}
"""Operation and implementation of the first checks, whose names name no implementation."""

Place = tuple[str, str, str, int, int, int]


def read(folder: Path, pattern: str) -> list[dict]:
    """Return the rows of the files that match, in the order of their names."""
    return [json.loads(text) for path in sorted(folder.glob(pattern)) for text in path.read_text().splitlines()]


def measured(folder: Path, pattern: str = "bench*.jsonl") -> dict[Place, dict]:
    """Return the benchmark's rows that have a time, by `ROW_KEY`; the last of several."""
    rows = [row for row in read(folder, pattern) if "microseconds" in row]
    rows = [row | {"impl": OLD_IMPLS.get(row["op"], {}).get(row["impl"], row["impl"])} for row in rows]
    return {tuple(row[name] for name in ROW_KEY): row for row in rows}


def row_of(rows: dict[Place, dict], op: str, impl: str, which: str, shape: Shape) -> dict | None:
    """Return the row of a call, if it was measured; a backend's name stands for its first form that was."""
    if (op, impl, which, *shape) in rows:
        return rows[op, impl, which, *shape]
    found = (row for row in rows.values() if what(row) == (op, which) and where(row) == shape)
    return next((row for row in found if row["impl"].partition("_")[0] == impl), None)


def time_of(rows: dict[Place, dict], op: str, impl: str, which: str, shape: Shape) -> float | None:
    """Return the microseconds of a call, if it was measured; `impl` is as in `row_of`."""
    row = row_of(rows, op, impl, which, shape)
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
    return OLD_CHECKS[words[0]]


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
    """Return the shapes of Taylor attention with the sets' tokens in a batch, or one row that is longer, by T."""
    found = {where(row) for row in rows.values() if row["op"] == "taylor_attention" and row["heads"] == TIMED_HEADS}
    full = (x for x in found if x[0] * x[2] == BATCH_TOKENS or (x[0] == 1 and x[2] > BATCH_TOKENS))
    return sorted(full, key=lambda x: x[2])


def batches(rows: dict[Place, dict], time: int) -> list[Shape]:
    """Return the shapes of Taylor attention with T tokens, by B H."""
    found = {where(row) for row in rows.values() if row["op"] == "taylor_attention" and row["seq_len"] == time}
    return sorted(found, key=lambda x: x[0] * x[1])


def best(values: Sequence[float | None]) -> float | None:
    """Return the smallest of what was measured."""
    return min((x for x in values if x is not None), default=None)

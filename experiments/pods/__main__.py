"""Language models compiled ahead of time for pods: what a step needs there, and an estimate of its time.

python -m experiments.pods run [--only=TEXT]     compiles the grid, each program in a process of its own; rows are kept
python -m experiments.pods run --without-kernels the same, what `auto` takes kernels for left to XLA
python -m experiments.pods table                 writes the README's tables from the rows
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from based_jax.pictures.tables import filled, markdown
from based_jax.revision import revision

FOLDER = Path(__file__).parent
README, RESULTS = FOLDER / "README.md", FOLDER / "results"
ROWS, WITHOUT_KERNELS = RESULTS / "pods.jsonl", RESULTS / "without_kernels.jsonl"
MODELS = {
    "based_1b": ["--config=configs/based.py:1b"],
    "based_360m": ["--config=configs/based.py:360m"],
    "attn_1b": ["--config=configs/attention.py:1b"],
    "mamba_1b": ["--config=configs/mamba.py:1b", "--config.model.remat=full"],
    "gated_deltanet_360m": ["--config=configs/gated_deltanet.py:360m"],
}
"""Mamba's projections, twice as wide as the others', would not fit a v5e."""
ROWS_UNDER_SEQUENCE = {"gated_deltanet_360m": 2}
"""Where time is cut, in place of a pod's: with one row a device libtpu 0.0.52 aborts over the delta rule's products."""
FAILED_CHECK = re.compile(r"Check failed: .*")
GIB = 1 << 30


class Pod(NamedTuple):
    """Devices, and how the rows of each length lie on them.

    Attributes:
      topology, slices: arguments of `aot`.
      meshes: its mesh by the tokens of a row.
      rows: by the tokens, those of each device along "data" and "fsdp".
    """

    topology: str
    slices: int
    meshes: dict[int, str]
    rows: dict[int, int]


PODS = (
    Pod("v5e:16x16", 1, {2048: "data:16,fsdp:16", 32768: "data:4,fsdp:16,sequence:4"}, {2048: 4, 32768: 1}),
    Pod("v6e:16x16", 1, {2048: "data:16,fsdp:16", 32768: "data:8,fsdp:16,sequence:2"}, {2048: 8, 32768: 1}),
    Pod("v5p:8x8x8", 1, {2048: "data:32,fsdp:16", 32768: "data:32,fsdp:16"}, {2048: 16, 32768: 1}),
    Pod("v5p:8x8x8", 2, {2048: "data:64,fsdp:16", 32768: "data:64,fsdp:16"}, {2048: 16, 32768: 1}),
)
"""Where 16 devices divide a width of 1,792 each has 112 of it, whole tiles of bf16; of 64 or 256 it would have none."""


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--only", default="", help="of the grid the points whose name has this text")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a point (default: 3600)")
    parser.add_argument("--without-kernels", action="store_true", help="keep rows of XLA's forms alone, to compare")
    args = parser.parse_args()
    if args.command == "run":
        chosen = {name: arguments for name, arguments in points() if args.only in name}
        if not chosen:
            parser.error(f"no point has '{args.only}' in its name; they are {', '.join(name for name, _ in points())}.")
        for name, arguments in chosen.items():
            compile_point(name, arguments, args.timeout, args.without_kernels)
    write_tables()
    return 0


def write_tables() -> None:
    """Write the tables between their marks in the README."""
    README.write_text(filled(README.read_text(), {name: made() for name, made in TABLES.items()}))


def points() -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the arguments of each point, those that tell most first."""
    for model, config in MODELS.items():
        for tokens in (2048, 32768):
            for pod in PODS:
                where = [f"--topology={pod.topology}", f"--slices={pod.slices}", f"--mesh={pod.meshes[tokens]}"]
                rows = ROWS_UNDER_SEQUENCE.get(model) if "sequence" in pod.meshes[tokens] else None
                what = [f"--rows-per-device={rows or pod.rows[tokens]}", f"--config.data.seq_len={tokens}"]
                yield f"{model} {tokens} {pod.slices} x {pod.topology}", [*config, *what, *where]


def compile_point(name: str, arguments: list[str], timeout: float, without_kernels: bool = False) -> None:
    """Compile a point and keep its row, or why there is none."""
    path = WITHOUT_KERNELS if without_kernels else ROWS
    begin, out = time.perf_counter(), path.with_suffix(f".{os.getpid()}.part")
    command = ["python", "-m", "based_jax", "aot", "--program=train", *arguments]
    command += ["--without-kernels"] if without_kernels else []
    out.unlink(missing_ok=True)
    try:
        run = subprocess.run(
            [sys.executable, *command[1:], f"--out={out}"], stderr=subprocess.PIPE, text=True, timeout=timeout
        )
        said = why_not(run.returncode, run.stderr)
    except subprocess.TimeoutExpired:
        said = f"not compiled within {timeout:.0f} s."
    lines = out.read_text().splitlines() if out.exists() else []
    row = json.loads(lines[0]) if lines else {}  # of what does not fit there may be none
    row |= {"point": name, "wall_seconds": round(time.perf_counter() - begin, 1)}
    row |= {"revision": revision(), "command": " ".join(command)}
    row |= {"error": said} if said else {}
    out.unlink(missing_ok=True)
    kept = {old["point"]: old for old in read(path)} | {name: row}
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(kept[point]) + "\n" for point, _ in points() if point in kept))
    print(f"{name}: {said or f'{row["estimate"]["sum_mfu"]:.1%}'}, {row['wall_seconds']:.0f} s", flush=True)


def why_not(code: int, stderr: str) -> str:
    """Return one sentence on why compiling ended with a code, from what it wrote; "" for code 0."""
    if failed := FAILED_CHECK.search(stderr if code < 0 else ""):
        return f"the compiler aborts: {failed[0]}"
    if code > 0 and stderr.strip():
        return stderr.strip().splitlines()[-1].removeprefix("Error: ")
    return f"compiling ended with code {code}." if code else ""


def read(path: Path = ROWS) -> list[dict]:
    """Return the rows of a file that there are."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table() -> str:
    """Return the table of all rows."""
    return markdown(pd.DataFrame(list(map(told, read()))))


def kernel_table() -> str:
    """Return the table of points whose rows name their kernels, beside those without."""
    without = {row["point"]: row for row in read(WITHOUT_KERNELS) if "seconds" in row}
    rows = [row for row in read() if row.get("kernels") and row["point"] in without]
    return markdown(pd.DataFrame([beside(row, without[row["point"]]) for row in rows]))


def beside(row: dict, without: dict) -> dict[str, str]:
    """Return the cells of a point with kernels beside those of XLA's forms."""
    model, tokens, pod = row["point"].split(" ", 2)
    both, kernels = (without, row), row["kernels"]
    copied = sum(of["copied_bytes"] for of in kernels.values())

    def arrow(name: str, unit: str, read) -> dict[str, str]:
        return {name: " -> ".join(f"{read(x):{unit}}" for x in both)}

    return {
        **{"model": f"`{model}`", "tokens": f"{int(tokens):,}", "pod": pod.removeprefix("1 x ")},
        "kernels": ", ".join(f"`{name}` {of['runs']:,}" for name, of in kernels.items()),
        "copies for them": f"{sum(of['copies'] for of in kernels.values()):,}"
        + f", {copied / 1e9:.1f} GB" * bool(copied),
        **arrow("ms of compute", ".0f", lambda x: 1e3 * x["seconds"]["compute"]),
        **arrow("of HBM", ".0f", lambda x: 1e3 * x["seconds"]["memory"]),
        **arrow("GiB", ".1f", lambda x: x["memory"]["peak"] / GIB),
        **arrow("MFU by the sum", ".1%", lambda x: x["estimate"]["sum_mfu"]),
        **arrow("by the bound", ".1%", lambda x: x["estimate"]["bound_mfu"]),
    }


def told(row: dict) -> dict[str, str]:
    """Return the cells of a row."""
    model, tokens, pod = row["point"].split(" ", 2)
    cells = {"model": f"`{model}`", "tokens": f"{int(tokens):,}", "pod": pod.removeprefix("1 x ")}
    if "seconds" not in row:
        return cells | {"MFU by the sum": row["error"]}
    seconds, estimate, sent = row["seconds"], row["estimate"], row["exchanged_bytes"]
    parts = seconds["compute"], seconds["memory"], seconds["links"] + seconds["network"]
    return cells | {
        "libtpu": row["versions"]["libtpu"],
        "mesh": ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()),
        "rows of a chip": f"{row['tokens'] // int(tokens) / devices(row):g}",
        "GiB (temporaries)": f"{row['memory']['peak'] / GIB:.1f} ({row['memory']['temporaries'] / GIB:.1f})",
        "ms: compute + HBM + exchange": " + ".join(f"{1e3 * part:.0f}" for part in parts),
        "GB sent (times FSDP's)": f"{sent / 1e9:.1f} ({sent / row['fsdp_bytes']:.2f})",
        "most of it": most_sent(row),
        "MFU by the sum": f"{estimate['sum_mfu']:.1%}" + (f"; {row['error']}" if "error" in row else ""),
        "by the bound": f"{estimate['bound_mfu']:.1%}, {row['bound']}",
    }


def most_sent(row: dict) -> str:
    """Return the collectives that send most, with their axes."""
    return ", ".join(f"{x['kind']} over {'+'.join(x['axes'])} {x['bytes'] / 1e9:.1f}" for x in row["exchanged"][:2])


def devices(row: dict) -> int:
    """Return the number of devices of a row's mesh."""
    return math.prod(row["mesh"].values())


TABLES = {"table": table, "kernels": kernel_table}
"""By their marks in the README."""


if __name__ == "__main__":
    sys.exit(main())

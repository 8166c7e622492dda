"""What kernels for TPUs cost as libtpu schedules them, beside XLA's forms and the bytes that have to be moved.

python -m experiments.tpu run [--only=TEXT]      compiles the points, each in a process of its own; rows are kept
python -m experiments.tpu table                  writes the README's table from the rows
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

from based_jax.pictures.tables import markdown
from experiments.tpu import points

FOLDER = Path(__file__).parent
ROWS, README = FOLDER / "results" / "static.jsonl", FOLDER / "README.md"
README_TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--only", default="", help="the points whose name has this text")
    args = parser.parse_args()
    if args.command == "run":
        for name in points.POINTS:
            if args.only in name:
                compile_point(name)
    README.write_text(README_TABLE.sub(lambda block: f"{block[1]}{table()}\n{block[2]}", README.read_text()))
    return 0


def compile_point(name: str) -> None:
    """Compile a point and keep its row."""
    command = [sys.executable, "-m", "experiments.tpu.points", name]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(run.stdout.splitlines()[-1])
    kept = {old["point"]: old for old in read()} | {name: row}
    ROWS.parent.mkdir(exist_ok=True)
    ROWS.write_text("".join(json.dumps(kept[point]) + "\n" for point in points.POINTS if point in kept))
    print(f"{name}: {row['cycles']:,} cycles", flush=True)


def read() -> list[dict]:
    """Return the rows that there are."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table() -> str:
    """Return the table of all calls on all chips, a row each."""
    by_call: dict[tuple[str, str], dict[str, dict]] = {}
    for row in read():
        by_call.setdefault((row["call"], row["chip"]), {})[row["impl"]] = row
    return markdown(pd.DataFrame([told(call, chip, rows) for (call, chip), rows in by_call.items()]))


def told(call: str, chip: str, rows: dict[str, dict]) -> dict[str, str]:
    """Return the cells of a call on a chip."""
    kernel, xla = rows["tpu"], rows.get("xla")
    cells = {
        "call": call,
        "chip": chip,
        "HBM, us": f"{kernel['hbm_microseconds']:.0f}",
        "kernel, 1000 cycles": f"{kernel['cycles'] / 1e3:.0f}",
        "keeps up at": f"{clock(kernel):.2f} GHz",
        "states copied": "yes" if kernel["copied"] else "no",
    }
    return cells | (
        {"XLA's form, 1000 cycles": f"{xla['cycles'] / 1e3:.0f}", "its GHz": f"{clock(xla):.2f}"} if xla else {}
    )


def clock(row: dict) -> float:
    """Return at how many GHz cycles take as long as HBM."""
    return row["cycles"] / row["hbm_microseconds"] / 1e3


if __name__ == "__main__":
    sys.exit(main())

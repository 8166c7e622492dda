"""The server under load: tokens a second, and how long clients wait, by their number.

python -m experiments.serving run      times the loads; rows are appended
python -m experiments.serving table    writes the README's table from the rows
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from based_jax.bench.rows import read
from based_jax.pictures.tables import filled, markdown

README = Path(__file__).parent / "README.md"
ROWS = README.parent / "results" / "serving.jsonl"
MODEL = ("--config=configs/based.py:1b", "--option=taylor.flush=16")
LOADS = (
    ("--clients", "1", "16", "128"),
    ("--clients", "200", "--slots=128", "--prompt=64-2048", "--new=16-256"),
)


def run() -> int:
    """Time each load, a server for each; return 1 if one failed."""
    command = [sys.executable, "-m", "based_jax", "bench", "serve", f"--out={os.path.relpath(ROWS)}", *MODEL]
    return int(any([subprocess.run([*command, *load]).returncode for load in LOADS]))


def table(rows: Sequence[dict]) -> str:
    """Return the last row of each load as a table."""
    last = {_load(row): row for row in rows}
    return markdown(pd.DataFrame([_cells(row) for _, row in sorted(last.items())]))


def _load(row: dict) -> tuple:
    return row["slots"], row["clients"], *row["prompt_tokens"], *row["new_tokens"], row["drafts"]


def _cells(row: dict) -> dict[str, str]:
    first, between = row["first_text_milliseconds"], row["token_milliseconds"]
    return {
        "clients": f"{row['clients']}",
        "slots": f"{row['slots']}",
        "prompt": _span(row["prompt_tokens"]),
        "new": _span(row["new_tokens"]),
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "ms to the first text, median (95 %)": f"{first['median']:,.0f} ({first['p95']:,.0f})",
        "ms from token to token": f"{between['median']:.2f} ({between['p95']:.2f})",
    }


def _span(tokens: Sequence[int]) -> str:
    least, most = tokens
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def main() -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    if parser.parse_args().command == "run":
        return run()
    README.write_text(filled(README.read_text(), {"loads": table(read(ROWS))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write the table of the README from the rows that `bench static` has kept.

python -m based_jax bench static --topology v5e v5p v6e v7x --out=experiments/tpu/results/static.jsonl
python -m experiments.tpu
"""

import json
import re
from pathlib import Path

import pandas as pd

from based_jax.pictures.tables import markdown

FOLDER = Path(__file__).parent
ROWS, README = FOLDER / "results" / "static.jsonl", FOLDER / "README.md"
README_TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write the table."""
    README.write_text(README_TABLE.sub(lambda block: f"{block[1]}{table()}\n{block[2]}", README.read_text()))


def read() -> list[dict]:
    """Return the rows."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def table() -> str:
    """Return the table of all calls on all chips, a row each."""
    by_call: dict[tuple[str, str], dict[str, dict]] = {}
    for row in read():
        by_call.setdefault((row["call"], row["chip"]), {})[row["impl"]] = row
    return markdown(pd.DataFrame([told(call, chip, rows) for (call, chip), rows in by_call.items()]))


def told(call: str, chip: str, rows: dict[str, dict]) -> dict[str, str]:
    """Return the cells of a call on a chip."""
    kernel, xla = rows["tpu"], rows.get("xla")
    return {
        "call": call,
        "chip": chip,
        "HBM, us": f"{kernel['hbm_microseconds']:.0f}",
        "bundles": f"{kernel['bundles_per_token_and_head']:.1f}",
        "keeps up at": f"{clock(kernel):.2f} GHz",
        "spills": f"{kernel['spills']}",
        "VMEM": f"{kernel['vmem_bytes'] / 2**20:.1f} MiB",
        "copies": f"{kernel['copies']}{', of states too' if kernel['copied'] else ''}",
        "XLA's form": f"{xla['bundles_per_token_and_head']:.1f}" if xla else "-",
        "its GHz": f"{clock(xla):.2f}" if xla else "-",
        "its copies": f"{xla['copies']}" if xla and xla["copies"] is not None else "-",
    }


def clock(row: dict) -> float:
    """Return at how many GHz cycles take as long as HBM."""
    return row["cycles"] / row["hbm_microseconds"] / 1e3


if __name__ == "__main__":
    main()

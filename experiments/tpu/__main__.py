"""Write the tables of the README from the rows that `bench static` has kept.

python -m based_jax bench static --topology v5e v5p v6e v7x --out=experiments/tpu/results/static.jsonl
python -m experiments.tpu
"""

import json
from pathlib import Path

import pandas as pd

from based_jax.pictures.tables import filled, markdown

FOLDER = Path(__file__).parent
ROWS, README = FOLDER / "results" / "static.jsonl", FOLDER / "README.md"
PLAIN = "one pass"
"""The call whose cycles are those of its bytes."""


def main() -> None:
    """Write the tables between their marks."""
    README.write_text(filled(README.read_text(), {name: made() for name, made in TABLES.items()}))


def read() -> list[dict]:
    """Return the rows."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def by_call() -> dict[tuple[str, str], dict[str, dict]]:
    """Return the rows of each call on each chip by their form."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in read():
        found.setdefault((row["call"], row["chip"]), {})[row["impl"]] = row
    return found


def table() -> str:
    """Return the table of all calls on all chips that have a kernel, a row each."""
    return markdown(pd.DataFrame([told(*of, rows) for of, rows in by_call().items() if "tpu" in rows]))


def left_table() -> str:
    """Return the table of what XLA's forms of calls move and take that read and write tokens once."""
    rows = by_call()
    plain = {chip: forms["xla"] for (call, chip), forms in rows.items() if call == PLAIN}
    known = {of: forms for of, forms in rows.items() if all("program_bytes" in row for row in forms.values())}
    measured = {of: forms for of, forms in known.items() if "xla" in forms and of[1] in plain}
    return markdown(pd.DataFrame([left(*of, forms, plain[of[1]]) for of, forms in measured.items()]))


def left(call: str, chip: str, forms: dict[str, dict], plain: dict) -> dict[str, str]:
    """Return the cells of a call on a chip, beside a plain pass on it."""
    xla, kernel = forms["xla"], forms.get("tpu")

    def passes(row: dict) -> float:
        return row["cycles"] / plain["cycles"] * plain["moved_bytes"] / row["moved_bytes"]

    return {
        "call": call,
        "chip": chip,
        "HBM, us": f"{xla['hbm_microseconds']:.0f}",
        "bytes": f"{xla['program_bytes'] / xla['moved_bytes']:.2f}",
        "FLOPs": f"{xla['program_flops'] / xla['flops']:.2f}" if xla["flops"] else "-",
        "time": "-" if xla["flops"] else f"{passes(xla):.2f}",
        "the kernel's bytes": f"{kernel['program_bytes'] / kernel['moved_bytes']:.2f}" if kernel else "-",
        "its time": f"{passes(kernel):.2f}" if kernel else "-",
    }


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
        "around it": f"{kernel['relayouts']}" if "relayouts" in kernel else "-",
        "XLA's form": f"{xla['bundles_per_token_and_head']:.1f}" if xla else "-",
        "its GHz": f"{clock(xla):.2f}" if xla else "-",
        "its copies": f"{xla['copies']}" if xla and xla["copies"] is not None else "-",
    }


def clock(row: dict) -> float:
    """Return at how many GHz cycles take as long as HBM."""
    return row["cycles"] / row["hbm_microseconds"] / 1e3


TABLES = {"table": table, "left": left_table}
"""By their marks in the README."""


if __name__ == "__main__":
    main()

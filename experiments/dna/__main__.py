"""Bits per base of held-out DNA by the length of what is read, of four models at equal parameters.

python -m based_jax sweep run experiments/dna/sweep.py --store=experiments/dna/results/runs
python -m experiments.dna markov    # the baselines of counting: results/markov.jsonl
python -m experiments.dna table     # writes the README's tables from the rows
python -m experiments.dna plot      # results/bits.png, .svg and .pdf
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from based_jax.bench.rows import appended, origin, read
from based_jax.pictures import paper, styles
from based_jax.pictures.tables import filled, markdown
from based_jax.store import Store
from experiments import commands
from experiments.dna import markov

FOLDER = Path(__file__).parent
README, RUNS, MARKOV = FOLDER / "README.md", FOLDER / "results" / "runs", FOLDER / "results" / "markov.jsonl"
FAMILIES = {"taylor": "Based", "attention": "Attention", "mamba": "Mamba", "hyena": "Hyena"}
"""By the mixer that tells them apart."""
TITLES = {"ecoli_536": "E. coli", "human_chr22_20M_21M": "human chr22"}
COUNTING = "counting, best mixture"
CAPTION = "All of the same 493,891 (E. coli) and 99,999 (human) held-out bases at each length."


def measured(store: Path) -> pd.DataFrame:
    """Return bits per base by model, length in training, file and length in the test, a row each."""
    rows = (cell for row in Store(store).rows() if row["status"] == "finished" for cell in _cells(row))
    columns = ["family", "trained", "file", "length", "bits", "params", "seconds", "device"]
    return pd.DataFrame(rows, columns=columns).sort_values(columns[:4], ignore_index=True)


def _cells(row: dict[str, Any]) -> Iterator[tuple]:
    kinds = {kind for kind, _ in row["config"]["model"]["layers"]}
    family = next(name for mixer, name in FAMILIES.items() if mixer in kinds)
    for segment, nats in row["segment_losses"].items():
        file, _, length = segment.rpartition("@")
        trained = row["config"]["data"]["seq_len"]
        facts = row["params"], row["seconds"], row["device"]
        yield family, trained, file, int(length), nats / math.log(2), *facts


def counted() -> pd.DataFrame:
    """Return the rows of the baselines."""
    return pd.DataFrame(read(MARKOV))


def best_counted(file: str) -> dict[str, dict[str, Any]]:
    """Return of a file the best order alone and the best mixture, as rows."""
    rows = counted().query("file == @file")
    return {model: found.loc[found.bits.idxmin()].to_dict() for model, found in rows.groupby("model")}


def bits_table(file: str) -> str:
    """Return a file's table: a row a model and length in training, a column a length in the test, and counting."""
    found = measured(RUNS).query("file == @file")
    lengths = sorted(found.length.unique())
    head = ["model", "bases a row in training", *(f"{length:,}" for length in lengths)]
    lines = []
    for (trained, family), cells in found.groupby(["trained", "family"]):
        bits = dict(zip(cells.length, cells.bits, strict=True))
        lines.append([family, f"{trained:,}", *(f"{bits[x]:.3f}" if x in bits else "-" for x in lengths)])
    names = {"order": "counting, order {}", "mixture": "counting, orders 0 to {} mixed"}
    for model, row in best_counted(file).items():
        lines.append([names[model].format(row["order"]), "-", *[f"{row['bits']:.3f}"] * len(lengths)])
    return markdown(pd.DataFrame(lines, columns=head))


def tables() -> dict[str, str]:
    """Return the README's tables by name."""
    return {file: bits_table(file) for file in TITLES}


def plot(path: Path) -> list[Path]:
    """Draw bits per base against the length in the test, a panel a file: colours are models, dashes their training."""
    rows = measured(RUNS)
    dashes = {
        f"trained on {trained:,}": dash for trained, dash in zip(_sorted(rows.trained), styles.DASHES, strict=False)
    }
    with matplotlib.rc_context(styles.PAPER):
        figure = paper.sheet(styles.PAGE_INCHES, 2.1, [*_sorted(rows.family), *dashes, COUNTING], [CAPTION])
        panels = figure.subplots(1, len(TITLES))
        for axes, (file, title) in zip(panels, TITLES.items(), strict=True):
            for (family, trained), line in rows.query("file == @file").groupby(["family", "trained"]):
                style = styles.FAMILY_STYLES[family]
                look = {"ls": dashes[f"trained on {trained:,}"], **styles.marked(style.colour, style.marker)}
                axes.plot(line.length, line.bits, label=family if look["ls"] == "-" else None, **look)
            for name, dash in dashes.items():
                axes.plot([], [], ls=dash, color="black", label=name)
            axes.axhline(best_counted(file)["mixture"]["bits"], color=styles.QUIET, ls=":", label=COUNTING)
            axes.set_xscale("log", base=2)
            axes.set_xticks(_sorted(rows.length), [f"{length:,}" for length in _sorted(rows.length)])
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel("bases that are read in one piece")
        panels[0].set_ylabel("bits per base")
        paper.add_legend(figure, panels[0])
        return paper.save(figure, path)


def _sorted(column: pd.Series) -> list:
    return sorted(column.unique())


def count_all() -> None:
    """Measure what counting reaches, and write the rows anew."""
    MARKOV.unlink(missing_ok=True)
    facts = origin()
    with appended(MARKOV) as write:
        for row in markov.rows():
            write(row | facts)


def write_tables() -> None:
    """Write the page's tables from the rows."""
    README.write_text(filled(README.read_text("utf-8"), tables()), "utf-8")


def main() -> int:
    """Run one command, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["markov", "table", "plot"])
    command = parser.parse_args().command
    if command == "plot":
        return commands.drawn(lambda: plot(FOLDER / "results" / "bits"))
    return commands.exit_code(count_all if command == "markov" else write_tables)


if __name__ == "__main__":
    sys.exit(main())

"""Write the tables of the README from the rows."""

import argparse
from collections.abc import Callable, Sequence

import pandas as pd

from based_jax.bench import rows as bench_rows
from based_jax.pictures.tables import filled, markdown
from experiments.several_gpus import layouts, processes, runs, serving, sweeping

README = runs.FOLDER / "README.md"
TABLES: dict[str, tuple[str, Callable[[Sequence[dict]], list[dict[str, str]]]]] = {
    "layouts": (layouts.OUT, layouts.table),
    "processes": (processes.OUT, processes.table),
    "sweep": (sweeping.OUT, sweeping.table),
    "serving": (serving.OUT, serving.table),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: rows and page are this folder's."""


def run(args: argparse.Namespace) -> int:
    """Write the tables."""
    tables = {name: _table(table(bench_rows.read(runs.RESULTS / file))) for name, (file, table) in TABLES.items()}
    README.write_text(filled(README.read_text(), tables))
    return 0


def _table(cells: Sequence[dict[str, str]]) -> str:
    return markdown(pd.DataFrame(cells)) if cells else "None has been measured."

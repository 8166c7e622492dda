"""Generation on one GPU: decoding against batch and context, and reading prompts, beside goals and other libraries.

python -m experiments.generation run [--only=TEXT] [--peers]    times each model; rows are appended
python -m experiments.generation table                          writes the README's tables from the rows
python -m experiments.generation plot                           draws the picture
"""

import os
import subprocess
import sys
from pathlib import Path

from based_jax.bench.rows import read
from based_jax.pictures.tables import filled
from experiments import commands
from experiments.generation import plots, tables
from experiments.generation.results import MODELS, PEERS, ROWS, Found, Model

README = Path(__file__).parent / "README.md"


def write_tables() -> None:
    """Write the README's tables."""
    README.write_text(filled(README.read_text(), tables.tables(Found.of(read(ROWS)))))


def draw() -> list[Path]:
    """Draw the picture and return its files."""
    return plots.draw(Found.of(read(ROWS)), ROWS.with_name("speed"))


def run(only: str, with_peers: bool) -> int:
    """Time the models whose name has a text, each in a process of its own; return 1 if one failed."""
    tasks = [words_of(name, x) for name, x in (MODELS | (PEERS if with_peers else {})).items() if only in name]
    command = [sys.executable, "-m", "based_jax", "bench", "generate", f"--out={os.path.relpath(ROWS)}"]
    return int(any([subprocess.run([*command, *words]).returncode for words in tasks]))


def words_of(name: str, model: Model) -> list[str]:
    """Return what is asked of `bench generate`."""
    what = f"--peer={name}" if name in PEERS else f"--config={model.config}"
    more = [*(f"--option={option}" for option in model.options), *([] if model.reads else ["--no-prefill"])]
    return [what, *more, "--sizes", *(f"{batch}x{context}" for batch, context in model.sizes)]


if __name__ == "__main__":
    sys.exit(commands.main(__doc__, run, write_tables, draw))

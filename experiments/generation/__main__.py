"""Generation on one GPU: decoding against batch and context, and reading prompts, beside goals and other libraries.

python -m experiments.generation run [--only=TEXT] [--peers]    times each model; rows are appended
python -m experiments.generation table                          writes the README's tables from the rows
python -m experiments.generation plot                           draws the picture
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from based_jax.bench.rows import read
from based_jax.pictures.tables import filled
from experiments import commands
from experiments.generation import plots, tables
from experiments.generation.results import MODELS, PEERS, ROWS, Found, Model

README = Path(__file__).parent / "README.md"
COMPILED_AT_ONCE = 4
"""Models, each in a process with threads of its own."""


def write_tables() -> None:
    """Write the README's tables."""
    README.write_text(filled(README.read_text(), tables.tables(Found.of(read(ROWS)))))


def draw() -> list[Path]:
    """Draw the picture and return its files."""
    return plots.draw(Found.of(read(ROWS)), ROWS.with_name("speed"))


def run(only: str, with_peers: bool) -> int:
    """Time the models whose name has a text, each in a process of its own; return 1 if one failed.

    Their programs are compiled before, several models at once, so that each has the GPU to itself for seconds alone.
    """
    models, peers = ([words_of(name, x) for name, x in some.items() if only in name] for some in (MODELS, PEERS))
    command = [sys.executable, "-m", "based_jax", "bench", "generate", f"--out={os.path.relpath(ROWS)}"]
    together = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with ThreadPoolExecutor(COMPILED_AT_ONCE) as threads:
        list(threads.map(lambda words: subprocess.run([*command, *words, "--compile-only"], env=together), models))
    tasks = models + (peers if with_peers else [])
    return int(any([subprocess.run([*command, *words]).returncode for words in tasks]))


def words_of(name: str, model: Model) -> list[str]:
    """Return what is asked of `bench generate`."""
    what = f"--peer={name}" if name in PEERS else f"--config={model.config}"
    more = [*(f"--option={option}" for option in model.options), *([] if model.reads else ["--no-prefill"])]
    return [what, *more, "--sizes", *(f"{batch}x{context}" for batch, context in model.sizes)]


if __name__ == "__main__":
    sys.exit(commands.main(__doc__, run, write_tables, draw))

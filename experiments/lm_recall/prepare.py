"""Make what all runs share: the packed corpus, and the file of questions.

The sets are those that come with the package, unless --data names larger ones.

    python -m experiments.lm_recall prepare --data squad_questions=squad_v1_dev.jsonl.xz
"""

import argparse
import lzma
import tarfile
from pathlib import Path

from based_jax.commands.eval.sources import add_data_argument, sources_of
from based_jax.errors import UserError
from based_jax.folders import writing
from experiments.lm_recall.measures import QUESTIONS

SWEEPS = Path(__file__).parent / "sweeps.py"
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 1, "lp": 1, "pb": 1}]
"""Of .xz for numbers of two bytes, which take 2 % less room so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--sweep", default=f"{SWEEPS}:study", help="file:variant (default: the study)")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="file that is made")
    parser.add_argument("--documents", type=int, default=500, help="examples of each set (default: 500, if as many)")
    parser.add_argument("--needles", type=int, default=100, help="examples of each length (default: 100)")
    parser.add_argument(
        "--bundle", type=Path, metavar="FILE", help=".tar.xz of both, to be unpacked in runs/ elsewhere"
    )
    add_data_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Pack the text, and write the questions."""
    from based_jax.data.tokenizer_file import named_tokenizer
    from based_jax.evals.recall_tasks import Selection, check_rows
    from based_jax.sweep.trial import load_sweep
    from experiments.lm_recall import questions

    if min(args.documents, args.needles) < 1:
        raise UserError(f"--documents is {args.documents} and --needles {args.needles}; both are at least 1.")
    sources = sources_of(args.data, questions.DOCUMENTS, questions.DOCUMENTS)
    _, config = load_sweep(args.sweep).trials()[0]
    parts = questions.parts_of(config.data.seq_len)
    check_rows(parts, sources)
    source = config.data.open(config.batch_size)
    print(*source.summary, sep="\n")
    limits = dict.fromkeys(questions.DOCUMENTS, args.documents) | dict.fromkeys(questions.NEEDLES, args.needles)
    selection = Selection(named_tokenizer(config.data.tokenizer), sources)
    questions.write(args.questions, questions.made(parts, selection, limits))
    print(f"Questions: {args.questions}.")
    if args.bundle:
        _bundle(args.bundle, source.folders[0], args.questions)
        print(f"Bundle: {args.bundle}, {args.bundle.stat().st_size / 1e6:.1f} MB.")


def _bundle(path: Path, corpus: Path, questions: Path) -> None:
    """Write the packed corpus and the questions as they lie below runs/; tokens take less room than their text."""
    with (
        writing(path),
        lzma.open(path, "wb", filters=XZ_FILTERS) as file,
        tarfile.open(fileobj=file, mode="w|") as bundle,
    ):
        bundle.add(corpus, "corpus")
        bundle.add(questions, f"lm_recall/{questions.name}")

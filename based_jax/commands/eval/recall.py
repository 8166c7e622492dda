"""Score what a model recalls of a text that it reads: zero-shot, greedy, up to 48 tokens or a newline.

Each example is a row in the folder of --out as soon as it is answered, so that the same command goes on where it was
stopped. Several models may fill one folder; `eval plot` compares them.

examples:
  python -m based_jax eval recall --model=runs/text --tasks=extraction,squad_questions --out=runs/recall
  python -m based_jax eval recall --model=runs/text --tasks=niah_single_1,phonebook --lengths=1x,2x,4x --out=runs/recall
  python -m based_jax eval recall --model=released/based --tasks=swde,fda --lengths=512 --reads=1,2 --out=runs/recall
  python -m based_jax eval recall --model=runs/text --tasks=fda --data=fda=sets/fda.jsonl --limit=100 --out=runs/recall
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from based_jax.commands.eval.sources import add_data_argument, sources_of
from based_jax.commands.parser import CommandParser
from based_jax.commands.text_models import add_model_folder_arguments, find_model_folder, load_model_folder
from based_jax.errors import UserError

if TYPE_CHECKING:
    from based_jax.evals.recall_tasks import Part


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    add_model_folder_arguments(parser)
    parser.add_argument("--tasks", required=True, metavar="A,B", help="names; an unknown one lists them all")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the rows, new or with rows in it")
    parser.add_argument("--name", help="of the model in tables (default: that of its folder)")
    parser.add_argument(
        "--lengths",
        default="",
        metavar="N,N",
        help="tokens that documents are cut to, and that made-up prompts have; 2x is twice the training length"
        " (default: whole documents; 1x)",
    )
    parser.add_argument("--reads", default="1", metavar="N,N", help="1, or 2 to have documents read twice (default: 1)")
    add_data_argument(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="examples of a task (default: all; 500 made up)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts read together (default: 8)")
    parser.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="tokens of a whole document's prompt (default: 2048)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of made-up prompts, and of which examples --limit keeps")


def run(args: argparse.Namespace) -> None:
    """Ask all parts, then print the means of this model's rows."""
    from based_jax.evals import recall, recall_tasks
    from based_jax.generate import Decoder
    from based_jax.store import Store

    sets = [name for name, task in recall_tasks.TASKS.items() if isinstance(task, recall_tasks.SetTask)]
    sources = sources_of(args.data, sets, args.tasks.split(","))
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; it is at least 1.")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it is at least 0.")
    recall.check_sizes(args.batch_size, args.max_length)
    parts = _parts(args, find_model_folder(args))
    recall_tasks.check_rows(parts, sources)
    store = Store(args.out)
    recall.rows_of(store)
    store.check_writable()
    model, tokenizer = load_model_folder(args)
    name = args.name or Path(args.model).resolve().name
    asked = recall.Asked(name, Decoder.of(model), tokenizer, args.batch_size, args.max_length)
    selection = recall_tasks.Selection(tokenizer, sources, args.limit, args.seed)
    recall.check_made_up(asked, parts, selection)
    for part in parts:
        recall.run_part(asked, part, selection, store, sys.stderr)
    rows = [row for row in recall.rows_of(store) if row["fingerprint"] == asked.decoder.fingerprint]
    print(recall.table(recall.summaries(rows)).to_string(index=False))


def _parts(args: argparse.Namespace, trained_length: int | None) -> "list[Part]":
    """Return what is asked."""
    from based_jax.evals.recall_tasks import parts_of

    lengths = [_length(word, trained_length) for word in args.lengths.split(",") if word]
    reads = [_whole(word, "--reads") for word in args.reads.split(",")]
    return parts_of(args.tasks.split(","), lengths, reads, trained_length or args.max_length)


def _length(word: str, trained_length: int | None) -> int:
    """Return a number of tokens, or of training lengths."""
    if not word.endswith("x"):
        return _whole(word, "--lengths")
    if trained_length is None:
        raise UserError(f"--lengths has '{word}', but a folder of weights has no training length; give tokens.")
    return _whole(word[:-1], "--lengths") * trained_length


def _whole(word: str, name: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UserError(f"{name} has '{word}'; it has whole numbers, with commas between them.") from None

"""Perplexity by slice: of tokens that can be recalled from what is read, of the others, and by what stands before.

Recalled are the second tokens of pairs that stand earlier in a window and that training had at most --rare times.

examples:
  python -m based_jax eval perplexity --model=runs/text
  python -m based_jax eval perplexity --model=released/based --data=my_texts --length=1024 --stride=512
  python -m based_jax eval perplexity --model=runs/text --rare=10 --out=runs/slices.csv
"""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from based_jax.commands.own_mixers import own_mixers
from based_jax.commands.parser import CommandParser, out_file
from based_jax.commands.text_models import add_model_folder_arguments, find_model_folder, load_model_folder
from based_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from based_jax.data.packing import PackedText
    from based_jax.data.tokenizer import TextTokenizer


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    add_model_folder_arguments(parser)
    parser.add_argument(
        "--data", metavar="FOLDER", help="corpus whose validation is judged (default: what the run was trained on)"
    )
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a window (default: the training length)")
    parser.add_argument("--stride", type=int, metavar="N", help="of them that are judged (default: half)")
    parser.add_argument(
        "--rare", type=int, default=1250, metavar="N", help="the most times that training has a pair (default: 1250)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows read together (default: 8)")
    parser.add_argument("--out", type=out_file, metavar="FILE", help="a table of the slices, .csv")


def run(args: argparse.Namespace) -> None:
    """Print the slices, and write them."""
    from based_jax.data.progress import Progress
    from based_jax.evals import slices
    from based_jax.evals.likelihood import Judge
    from based_jax.folders import make_folder, write_whole

    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it is at least 1.")
    if args.out is not None and args.out.suffix != ".csv":
        raise UserError(f"--out is '{args.out}'; its name ends in .csv.")
    trained_length = find_model_folder(args)
    length = trained_length if args.length is None else args.length
    if length is None:
        raise UserError("A folder of weights has no training length; give --length.")
    slicing = slices.Slicing(length, max(length // 2, 1) if args.stride is None else args.stride, args.rare)
    model, tokenizer = load_model_folder(args)
    judge = Judge(model, args.batch_size * length)
    packed = list(_packed(args, cast("TextTokenizer", tokenizer)))
    progress = Progress("Judged", sum(text.count("validation", "tokens") for text in packed), sys.stderr)

    def validation() -> "Iterator[np.ndarray]":
        for text in packed:
            yield from slices.documents(text.stream("validation"), tokenizer.end_of_text)

    training = (x for text in packed for x in slices.blocks(text.stream("train")))
    rare = slices.rare_pairs(validation(), training, slicing)
    found = slices.slice_losses(judge, validation(), rare, slicing, progress.update)
    progress.close()
    print(found.to_string(index=False, float_format="%.4f"))
    if args.out is not None:
        make_folder(args.out.parent)
        write_whole(args.out, found.to_csv(index=False))


def _packed(args: argparse.Namespace, tokenizer: "TextTokenizer") -> "Iterator[PackedText]":
    """Yield the packed text of --data, or of each corpus that the run was trained on."""
    from based_jax import config as configs
    from based_jax.data.packing import PackedText, default_cache_dir
    from based_jax.data.text import open_corpus
    from based_jax.nn.mixers import kind_of
    from based_jax.train.run import TrainConfig
    from based_jax.train.tasks import TextTask

    if args.data is None and args.workdir is None:
        raise UserError("A folder of weights does not say what it was trained on; give --data.")
    folders = [args.data]
    if args.data is None:
        task = configs.read(TrainConfig, args.workdir, [kind_of(mixer) for mixer in own_mixers(args)]).data
        assert isinstance(task, TextTask), "load_model_folder takes no other"
        folders = list(task.open(1).folders)
    for folder in folders:
        yield PackedText.open(open_corpus(folder), tokenizer, default_cache_dir())

"""Run lm-eval, whose arguments follow `--`, on a model of ours: `--model based_jax --model_args folder=FOLDER`.

FOLDER is a run on text or one of weights. Other keys of --model_args: step, tokenizer, dtype, and max_length (default:
2048), of which --batch_size (default: 1) rows are read together. The tasks local_lambada and local_arc_easy have their
rows here, or in a file: --metadata='{"lambada": "FILE"}'. The extra `eval` brings lm-eval.

examples:
  python -m based_jax eval lm_eval -- --model based_jax --model_args folder=runs/text --tasks local_arc_easy
  python -m based_jax eval lm_eval -- --model based_jax --model_args folder=runs/text --tasks piqa --batch_size 8
  python -m based_jax eval lm_eval -- ls tasks
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from based_jax.commands.parser import CommandParser
from based_jax.commands.text_models import load_model_folder
from based_jax.errors import UserError

if TYPE_CHECKING:
    from based_jax.data.tokenizer import Tokenizer
    from based_jax.nn.lm import LM

KEYS = "folder, step, tokenizer, dtype, batch_size, max_length"
OWN_TASKS = "lm_eval_tasks"
NO_FORKS = {"DISABLE_MULTIPROC": "1"}
"""lm-eval would fork a process with JAX's threads in it, to draw its bootstrap."""


def add_arguments(parser: CommandParser) -> None:
    """Declare that all that follows is lm-eval's."""
    parser.add_argument("words", nargs="*", metavar="-- ...", help="arguments of lm-eval")


def run(args: argparse.Namespace) -> None:
    """Hand the arguments to lm-eval, which finds the model and the local tasks."""
    from based_jax.evals import harness

    harness.register(load)
    from lm_eval.__main__ import cli_evaluate

    words = args.words
    if words and not any(word.startswith("--include_path") for word in words):
        words = [*words, "--include_path", str(Path(harness.__file__).parent / OWN_TASKS)]
    with patch.object(sys, "argv", ["lm-eval", *words]), patch.dict(os.environ, NO_FORKS):
        cli_evaluate()


def load(
    folder: str | None = None,
    step: int | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    **unknown: object,
) -> "tuple[LM, Tokenizer]":
    """Return the model and the tokenizer of a folder.

    Raises:
      UserError: there is none, an argument is unknown, or the folder is not of text.
    """
    if folder is None or unknown:
        wrong = f"has '{min(unknown)}'" if unknown else "has no folder"
        raise UserError(f"--model_args {wrong}; its keys are {KEYS}.")
    found = argparse.Namespace(model=str(folder), step=step, tokenizer=tokenizer, dtype=dtype, mixer=[], command="eval")
    return load_model_folder(found)

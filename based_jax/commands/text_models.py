"""Which language model, with which tokenizer, a command is about."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from based_jax.commands.own_mixers import add_mixer_argument, own_mixers
from based_jax.commands.parser import CommandParser
from based_jax.errors import UserError

if TYPE_CHECKING:
    from based_jax.data.tokenizer import Tokenizer
    from based_jax.generate import Decoder, Drafts
    from based_jax.nn.lm import LM

LOOKUP = "lookup"
"""What drafts out of the text itself, in place of a model's folder."""


def add_model_arguments(parser: CommandParser) -> None:
    """Declare where the model is."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="folder of a run on text")
    source.add_argument("--hf", help="folder with config.json and safetensors or pytorch_model.bin")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the last good one)")
    add_mixer_argument(parser)
    parser.add_argument(
        "--tokenizer", help="bytes, gpt2 or a tokenizer.json (default: that of the run, or that the folder names)"
    )


def add_option_argument(parser: argparse.ArgumentParser) -> None:
    """Declare options of mixers."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="MIXER.NAME=VALUE",
        help="of all layers of a mixer, as in taylor.flush=16; may be given several times",
    )


def add_decoding_arguments(parser: CommandParser) -> None:
    """Declare how the model decodes."""
    parser.add_argument("--dtype", help="what layers compute in, bfloat16 or float32 (default: that of the model)")
    parser.add_argument(
        "--flush", type=int, metavar="W", help="Taylor layers write their state every W tokens (default: as the model)"
    )
    parser.add_argument(
        "--state-dtype",
        help="of Taylor layers' states: float32, or with a --flush of 16 or more bfloat16, int8 or float8_e4m3fn",
    )
    add_option_argument(parser)


def add_drafts_argument(parser: CommandParser) -> None:
    """Declare what drafts tokens for the model."""
    parser.add_argument(
        "--drafts",
        metavar="lookup:N|FOLDER:N",
        help="verify N drafted tokens at once: those that followed the same words in the text before, or those of a"
        " smaller model with the same tokenizer, a run or a folder as of --hf; the answers stay what they are",
    )


def drafts_of(args: argparse.Namespace, tokenizer: "Tokenizer") -> "Drafts | None":
    """Return what drafts tokens for a model with this tokenizer.

    Raises:
      UserError: `args.drafts` is none, or names a model that cannot be read or has another tokenizer.
    """
    from based_jax.generate import Decoder, Drafts

    if args.drafts is None:
        return None
    source, _, count = args.drafts.rpartition(":")
    if not (source and count.isdecimal()):
        raise UserError(f"--drafts is '{args.drafts}'; it is lookup:N or FOLDER:N, as in lookup:4.")
    if source == LOOKUP:
        return Drafts.by_lookup(int(count))
    words = argparse.Namespace(
        model=source, dtype=None, step=None, tokenizer=None, mixer=args.mixer, command=args.command
    )
    model, own = load_model_folder(words)
    if own.fingerprint != tokenizer.fingerprint:
        raise UserError(f"The model of '{source}' has another tokenizer, and cannot draft for this one.")
    return Drafts.by_model(Decoder.of(model, args.dtype), int(count))


def decoder_of(args: argparse.Namespace, model: "LM") -> "Decoder":
    """Return the model as the arguments have it decode."""
    from based_jax.generate import Decoder

    return Decoder.of(model, args.dtype, flush=args.flush, state_dtype=args.state_dtype, options=args.option)


def add_model_folder_arguments(parser: CommandParser) -> None:
    """Declare the model as one folder, of whatever kind."""
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="a run on text, or config.json with safetensors or .bin"
    )
    add_mixer_argument(parser)
    parser.add_argument("--dtype", help="what layers compute in, bfloat16 or float32 (default: that of the model)")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the last good one)")
    parser.add_argument(
        "--tokenizer", help="bytes, gpt2 or a tokenizer.json (default: that of the run, or that the folder names)"
    )


def find_model_folder(args: argparse.Namespace) -> int | None:
    """Find out what `args.model` is, and return the tokens that a run was trained on at once; None of mere weights.

    Raises:
      UserError: the folder is neither a run nor one of weights.
    """
    from based_jax import config as configs
    from based_jax.folders import local_path
    from based_jax.nn.mixers import kind_of
    from based_jax.train.run import TrainConfig
    from based_jax.train.workdir import CHECKPOINTS_FOLDER

    folder = local_path(args.model, "--model")
    if not (folder / configs.CONFIG_FILE).is_file():
        raise UserError(f"'{folder}' is neither a run nor a folder of weights: it has no {configs.CONFIG_FILE}.")
    is_run = (folder / CHECKPOINTS_FOLDER).is_dir()
    args.workdir, args.hf = (args.model, None) if is_run else (None, args.model)
    known = [kind_of(mixer) for mixer in own_mixers(args)]
    return configs.read(TrainConfig, args.model, known).data.longest_test if is_run else None


def load_model_folder(args: argparse.Namespace) -> "tuple[LM, Tokenizer]":
    """Return the model and the tokenizer of `args.model`, to compute in `args.dtype` if that is given.

    Raises:
      UserError: the folder is neither a run nor one of weights, cannot be read, or is not of text.
    """
    find_model_folder(args)
    model, tokenizer = load_text_model(args)
    return (model if args.dtype is None else _computing_in(model, args.dtype)), tokenizer


def _computing_in(model: "LM", dtype: str) -> "LM":
    """Return a model with the same parameters whose layers compute in this dtype."""
    from flax import nnx

    from based_jax.nn.lm import LM

    config = dataclasses.replace(model.config, dtype=dtype)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.state(model))


def load_text_model(args: argparse.Namespace) -> "tuple[LM, Tokenizer]":
    """Return the model and the tokenizer that the arguments name.

    Raises:
      UserError: they cannot be read, or are not those of text.
    """
    return _from_hf(args) if args.workdir is None else _from_run(args)


def _from_run(args: argparse.Namespace) -> "tuple[LM, Tokenizer]":
    from based_jax.data.tokenizer_file import named_tokenizer
    from based_jax.train.run import load_run
    from based_jax.train.tasks import TextTask

    config, _, model = load_run(args.workdir, args.step, own_mixers(args))
    if not isinstance(config.data, TextTask):
        raise UserError(f"'{args.workdir}' was trained on '{config.data.kind}'; {args.command} needs a run on 'text'.")
    return model, named_tokenizer(args.tokenizer or config.data.tokenizer)


def _from_hf(args: argparse.Namespace) -> "tuple[LM, Tokenizer]":
    from based_jax.convert import load_hf
    from based_jax.convert.tokenizers import folder_tokenizer
    from based_jax.data.tokenizer_file import named_tokenizer

    if args.step is not None:
        raise UserError(f"--step is {args.step}, but a folder has no steps; leave it out, or give --workdir.")
    tokenizer = folder_tokenizer(args.hf) if args.tokenizer is None else named_tokenizer(args.tokenizer)
    return load_hf(args.hf), tokenizer

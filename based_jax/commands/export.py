"""Write the trained parameters of a run for other programs: safetensors, Orbax, or a folder in a published layout.

A GGUF file of a Llama is read in a run's place, its weights as the numbers that they stand for.

examples:
  python -m based_jax export runs/text --hf=released/text
  python -m based_jax export runs/text --hf=released/text --layout=llama
  python -m based_jax export runs/text --orbax=exported/text --safetensors=exported/text.safetensors --step=1000
  python -m based_jax export SmolLM2-135M-Instruct.Q4_1.gguf --hf=released/smollm2
"""

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from based_jax.commands.own_mixers import add_mixer_argument, own_mixers
from based_jax.errors import UserError

if TYPE_CHECKING:
    from based_jax.nn.lm import LM

TARGETS = {
    "hf": ("DIR", "folder of config.json, safetensors and tokenizer.json, as HazyResearch/based or transformers read"),
    "orbax": ("DIR", "folder that plain Orbax reads: parameters alone, by their flat names"),
    "safetensors": ("FILE", "file of safetensors: parameters alone, by their flat names"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="workdir of a run, or a .gguf file")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the last good one)")
    add_mixer_argument(parser)
    for name, (metavar, what) in TARGETS.items():
        parser.add_argument(f"--{name}", metavar=metavar, help=f"{what}; new or empty")
    parser.add_argument(
        "--layout",
        help="of --hf: based, llama, mistral, qwen2, qwen3, mamba, mamba_hf or based_jax (default: what fits)",
    )


def run(args: argparse.Namespace) -> None:
    """Write each target and say what is in it."""
    from based_jax.convert import save_hf, save_orbax, save_safetensors
    from based_jax.folders import check_free, check_utf8, local_path

    writers: Mapping[str, Callable[..., str | None]] = {
        "hf": functools.partial(save_hf, layout=args.layout),
        "orbax": save_orbax,
        "safetensors": save_safetensors,
    }
    targets = {name: getattr(args, name) for name in TARGETS if getattr(args, name) is not None}
    if not targets:
        raise UserError("Nothing to write; give --hf=DIR, --orbax=DIR or --safetensors=FILE.")
    for name, target in targets.items():
        path = local_path(target, f"--{name}")
        check_free(path)
        if name == "orbax":
            check_utf8(path)
    with _exported(args.run, args.step, own_mixers(args)) as (model, tokenizer, source):
        for name, target in targets.items():
            layout = writers[name](model, target, tokenizer=tokenizer)
            where = f"'{target}'" if layout is None else f"'{target}' in the layout '{layout}'"
            print(f"Wrote {model.num_params():,} parameters of {source} to {where}.")


@contextlib.contextmanager
def _exported(run: str, step: int | None, mixers: list[type]) -> "Iterator[tuple[LM, str | None, str]]":
    """Return the model, the name or file of its tokenizer, and what it is called; a file lasts as long as the context.

    Raises:
      UserError: it is neither a run nor a GGUF file, or cannot be read.
    """
    from based_jax.convert.gguf import GGUF_SUFFIX, read_gguf
    from based_jax.train.run import load_run
    from based_jax.train.tasks import TextTask

    if not run.endswith(GGUF_SUFFIX):
        config, found, model = load_run(run, step, mixers)
        yield model, config.data.tokenizer if isinstance(config.data, TextTask) else None, f"step {found}"
        return
    if step is not None:
        raise UserError(f"--step is {step}, but a GGUF file has no steps; leave it out.")
    file = read_gguf(run)
    with file.tokenizer_file() as tokenizer:
        yield file.model(), str(tokenizer), f"'{run}'"

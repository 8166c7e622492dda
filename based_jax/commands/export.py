"""Write the trained parameters of a run for other programs: safetensors, Orbax, or a folder in a published layout.

examples:
  python -m based_jax export runs/text --hf=released/text
  python -m based_jax export runs/text --hf=released/text --layout=llama
  python -m based_jax export runs/text --orbax=exported/text --safetensors=exported/text.safetensors --step=1000
"""

import argparse
import functools
from collections.abc import Callable, Mapping

from based_jax.errors import UserError

TARGETS = {
    "hf": ("DIR", "folder of config.json, safetensors and tokenizer.json, as HazyResearch/based or transformers read"),
    "orbax": ("DIR", "folder that plain Orbax reads: parameters alone, by their flat names"),
    "safetensors": ("FILE", "file of safetensors: parameters alone, by their flat names"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="workdir of a run")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the last good one)")
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
    from based_jax.train.run import load_run
    from based_jax.train.tasks import TextTask

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
    config, step, model = load_run(args.run, args.step)
    tokenizer = config.data.tokenizer if isinstance(config.data, TextTask) else None
    for name, target in targets.items():
        layout = writers[name](model, target, tokenizer=tokenizer)
        where = f"'{target}'" if layout is None else f"'{target}' in the layout '{layout}'"
        print(f"Wrote {model.num_params():,} parameters of step {step} to {where}.")

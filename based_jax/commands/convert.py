"""Export a trained run to safetensors and config.json in the layout of the released checkpoints.

examples:
  python -m based_jax convert --workdir=runs/text --hf=released/text
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the last good one)")
    parser.add_argument("--hf", required=True, help="folder to write, new or empty")


def run(args: argparse.Namespace) -> None:
    """Write the folder and say what is in it."""
    from based_jax.convert import save_hf
    from based_jax.train.run import load_run

    _, step, model = load_run(args.workdir, args.step)
    save_hf(model, args.hf)
    print(f"Wrote {model.num_params():,} parameters of step {step} to '{args.hf}'.")

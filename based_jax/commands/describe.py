"""Print one table over all mixers: parameters, state, train FLOPs, decode bytes and implementations at a width.

examples:
  python -m based_jax describe
  python -m based_jax describe --d-model=512 --seq-len=8192
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--d-model", type=int, default=1024, help="width D (default: 1024)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence (default: 2048)")


def run(args: argparse.Namespace) -> None:
    """Print the table, and what its columns mean."""
    import pandas as pd

    from based_jax.nn.describe import describe

    table = pd.DataFrame(describe(args.d_model, args.seq_len), dtype=object)
    table["params"] = table["params"].map("{:,}".format, na_action="ignore")
    table["implementations"] = table["implementations"].fillna(table.pop("does_not_fit"))
    print(table.fillna("-").to_string(index=False))
    print(
        f"\nOne mixer of width {args.d_model} with its default options, layers in bf16.\n"
        f"State: what decoding keeps of one sequence of {args.seq_len} tokens.\n"
        "Train FLOPs: three times the forward pass, per token.\n"
        "Decode bytes: parameters in bf16, and the state read and written once, per token of one sequence."
    )

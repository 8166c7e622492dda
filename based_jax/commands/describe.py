"""Print one table over all mixers: parameters, state, train FLOPs, decode bytes and implementations at a width."""

import argparse

from based_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--d-model", type=int, default=1024, help="width D (default: 1024)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence (default: 2048)")


def run(args: argparse.Namespace) -> None:
    """Print the table, and what its columns mean."""
    import pandas as pd

    from based_jax.nn.describe import describe

    for name in ("d_model", "seq_len"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; it is at least 1.")
    rows = [vars(row) for row in describe(args.d_model, args.seq_len)]
    print(pd.DataFrame(rows).to_string(index=False, formatters={"params": "{:,}".format}, na_rep="-"))
    print(
        f"\nOne mixer of width {args.d_model} with its default options, layers in bf16.\n"
        f"State: what decoding keeps of one sequence of {args.seq_len} tokens.\n"
        "Train FLOPs: three times the forward pass, per token.\n"
        "Decode bytes: parameters in bf16, and the state read and written once, per token of one sequence."
    )

"""Look inside a run: attention maps, how far heads read, norms of states, and what each layer is worth.

examples:
  python -m based_jax inside --workdir=runs/mqar --out=runs/inside
"""

import argparse
import itertools

from based_jax.commands.own_mixers import add_mixer_argument, own_mixers
from based_jax.errors import UserError

BATCHES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--workdir", required=True, help="a run, with layers of attention, windows or Taylor attention")
    parser.add_argument("--out", required=True, help="folder of the picture and the page")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the last good one)")
    add_mixer_argument(parser)
    parser.add_argument(
        "--batches",
        type=int,
        default=BATCHES,
        help=f"of the run's tests, that layers are left out on (default: {BATCHES})",
    )


def run(args: argparse.Namespace) -> None:
    """Draw, and print the tables."""
    import pandas as pd

    from based_jax.folders import local_path
    from based_jax.inside import report
    from based_jax.train.run import load_run

    if args.batches < 1:
        raise UserError(f"--batches is {args.batches}; it is at least 1.")
    out = local_path(args.out, "--out")
    config, step, model = load_run(args.workdir, args.step, own_mixers(args))
    source = config.data.open(config.batch_size)
    batches = ((name, batch) for name in source.eval_names for batch in source.eval_batches(name))
    found = report.look(model, list(itertools.islice(batches, args.batches)))
    print(pd.DataFrame(found.rows).round(2).to_string(index=False))
    if found.removals:
        print(f"\n{pd.DataFrame(found.removals).round(3).to_string(index=False)}\n")
    drawn = report.draw(found, out / "inside")
    drawn.append(report.page(found, out / "inside.html", title=f"Inside {args.workdir}, step {step}"))
    print(f"Drawn: {', '.join(map(str, drawn))}.")

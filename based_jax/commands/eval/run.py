"""Evaluate a trained run on its own data: perplexity and accuracy, per segment where the task has several."""

import sys
from argparse import Namespace

from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.distributed import add_distributed_arguments
from based_jax.commands.own_mixers import add_mixer_argument, own_mixers
from based_jax.commands.parser import CommandParser
from based_jax.errors import UserError


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--workdir", help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint to evaluate (default: the last good one)")
    add_mixer_argument(parser)
    add_distributed_arguments(parser)
    add_compiled_argument(parser)


def run(args: Namespace) -> None:
    """Print every metric of the run's evaluation data."""
    if args.workdir is None:
        raise UserError("The following arguments are required: --workdir, or a task; see eval --help.")
    import jax

    from based_jax import parallel
    from based_jax.evals.evaluate import evaluate, model_sums
    from based_jax.train import data_record
    from based_jax.train.run import load_run

    config, step, model = load_run(args.workdir, args.step, own_mixers(args))
    mesh = parallel.make_mesh()
    feed = parallel.Feed(mesh, batch_size=-(-config.batch_size // mesh.size) * mesh.size)
    source = config.data.open(feed.batch_size, feed.rows)
    if (change := data_record.changed_since(source, args.workdir)) and jax.process_index() == 0:
        print(f"Warning: {change}.", file=sys.stderr)
    batches = ((name, batch) for name in source.eval_names for batch in source.eval_batches(name))
    print(f"step {step}")
    sums_of = model_sums(model)
    with jax.set_mesh(mesh):
        results = evaluate(lambda batch: sums_of(feed.arrays(batch)), batches)
    for name, value in results.items():
        print(f"{name:24} {value:.4f}")

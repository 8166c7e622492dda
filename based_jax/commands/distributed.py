"""The arguments of commands that several processes run together, one for each host or device."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from based_jax.commands.parser import CommandParser, seconds
from based_jax.errors import UserError

BY_HAND = ("coordinator", "num_processes", "process_id")
OF_A_PROCESS = (*BY_HAND, "distributed", "distributed_timeout", "hf", "tokenizer")
"""Arguments that may differ: what tells processes apart, and files that each host may have elsewhere."""
ONE_RESULT = ("eval", "generate")
"""Commands whose arguments all processes have alike; `train` compares what they come to, and a sweep has none."""


def add_distributed_arguments(parser: CommandParser) -> None:
    """Declare the arguments that make a command one process of several."""
    group = parser.add_argument_group("several processes, each of which runs this command")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the others by the variables of SLURM, Open MPI, GKE, Cloud TPU, Kubernetes or torchrun",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="or by hand: where process 0 listens")
    group.add_argument("--num-processes", type=int, help="how many there are")
    group.add_argument("--process-id", type=int, help="which of them this one is, from 0")
    group.add_argument("--distributed-timeout", type=seconds, default=300.0, help="seconds to wait for the others")


@contextlib.contextmanager
def together(args: argparse.Namespace) -> Iterator[None]:
    """Run a command as one process of several, if its arguments say so; UserError where the others do not come."""
    given: dict[str, Any] = {name: getattr(args, name, None) for name in BY_HAND}
    if not getattr(args, "distributed", False) and not any(value is not None for value in given.values()):
        yield
        return
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    if missing and len(missing) < len(BY_HAND):
        raise UserError(f"{' and '.join(missing)} must be given, too: the three name one process of several.")
    from based_jax.train import agreement, hosts

    place = hosts.found_place() if missing else hosts.given_place(**given)
    with contextlib.ExitStack() as stack:
        if place.process_id > 0:  # process 0 speaks for all; what is wrong, each says by itself
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        # Processes of a sweep share its points, not their devices.
        stack.enter_context(hosts.together(place, args.distributed_timeout, devices=args.command != "sweep"))
        if args.command in ONE_RESULT:
            agreement.check_alike({name: value for name, value in vars(args).items() if name not in OF_A_PROCESS})
        yield

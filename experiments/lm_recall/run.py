"""Train and measure all that the store has no row of, in the order of the sweep.

A run has the device to itself while it trains and is measured; meanwhile those that follow get ready. Each finished run
is a row at once, so that the same command goes on wherever it was stopped.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from based_jax.errors import UserError
from based_jax.store import Store
from based_jax.sweep.trial import load_sweep

FOLDER = Path(__file__).parent
SWEEPS, STORE, QUESTIONS = FOLDER / "sweeps.py", FOLDER / "results" / "runs", Path("runs/lm_recall/questions.jsonl.xz")
SECONDS_BETWEEN_LOOKS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--sweep", default=f"{SWEEPS}:study", help="file:variant (default: the study)")
    parser.add_argument("--store", default=STORE, help="folder of the rows (default: results/runs)")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="file that `prepare` has made")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no run is begun")
    parser.add_argument("--ready", type=int, default=8, help="runs that get ready at a time (default: 8)")


def run(args: argparse.Namespace) -> int:
    """Start a process for each run; return 1 if one has failed."""
    until = time.time() + args.seconds
    store, sweep = Store(args.store), load_sweep(args.sweep)
    store.check_writable()
    if args.ready < 1:
        raise UserError(f"--ready is {args.ready}; it is at least 1.")
    if not args.questions.exists():
        raise UserError(f"There are no questions at '{args.questions}'; `prepare` makes them.")
    ids = store.ids()
    left = [place for place, (_, config) in enumerate(sweep.trials()) if config.id not in ids]
    print(f"{len(sweep.trials()) - len(left)} of {len(sweep.trials())} runs have rows.", flush=True)
    failed = _work_off(left, args, until)
    print(f"{len({config.id for _, config in sweep.trials()} & store.ids())} runs have rows now.", flush=True)
    return int(failed)


def _work_off(places: list[int], args: argparse.Namespace, until: float) -> bool:
    """Keep `args.ready` processes, and return whether one has failed."""
    context, running, failed = multiprocessing.get_context("spawn"), [], False
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # what gets ready leaves the memory to what trains
    command = " ".join(["python -m experiments.lm_recall", *sys.argv[1:]])
    try:
        while places or running:
            while places and len(running) < args.ready and time.time() < until:
                call = args.sweep, places.pop(0), str(args.store), args.questions, until, command
                running.append(context.Process(target=_train_point, args=call, daemon=True))
                running[-1].start()
            if time.time() >= until:
                places.clear()
            time.sleep(SECONDS_BETWEEN_LOOKS)
            failed |= any(process.exitcode for process in running)
            running = [process for process in running if process.is_alive()]
    finally:
        for process in running:
            process.kill()
    return failed


def _train_point(spec: str, place: int, store_path: str, questions: Path, until: float, command: str) -> None:
    """Get a run ready, wait for the device, and write its row if there is time for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends of it, and ends this process
    import jax

    from based_jax import compilation
    from based_jax.sweep.device_lock import DeviceLock
    from based_jax.sweep.launch import name_of
    from based_jax.sweep.rows import facts_of
    from experiments.lm_recall import questions as asked
    from experiments.lm_recall.training import Run

    compilation.keep()
    begin = time.time()
    point, config = load_sweep(spec).trials()[place]
    name = _title(point, place)

    def tell(text: str) -> None:
        print(f"[{time.time() - begin:5.0f} s] {name}: {text}", flush=True)

    try:
        run = Run(point, config, asked.read(questions))
        tell(f"ready after {run.seconds_to_prepare:.0f} s")
        store = Store(store_path)
        with DeviceLock(jax.devices()[0]):
            rows = store.rows()
            needed = max((row["seconds"] for row in rows), default=0.0)
            if config.id in {row["id"] for row in rows} or time.time() + needed > until:
                tell("not begun: no time is left")
                return
            tell("begins")
            row = run.row(tell)
            store.append(row | facts_of(name_of(spec), command) | {"model": name.partition(",")[0]})
        tell(f"{row['status']} after {row['seconds']:.0f} s, perplexity {row['perplexity']}")
    except Exception:
        traceback.print_exc()
        tell("FAILED")
        sys.exit(1)


def _title(point: dict, place: int) -> str:
    """Return the name of a point's model, its rate and its seed."""
    from experiments.lm_recall import sweeps

    return f"{sweeps.name_of(point, f'model {place}')}, lr {point.get('optim.lr')}, seed {point.get('seed')}"

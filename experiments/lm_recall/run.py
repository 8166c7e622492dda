"""Train and measure all that the store has no row of, in the order of the sweep.

One run trains or is measured at a time; meanwhile those that follow get ready. Each finished run is a row at once, so
that the same command goes on wherever it was stopped.
"""

import argparse
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing import connection
from pathlib import Path

import jax

from based_jax import compilation
from based_jax.errors import UserError
from based_jax.store import Store
from based_jax.sweep.claims import Claims
from based_jax.sweep.device_lock import DeviceLock
from based_jax.sweep.launch import name_of
from based_jax.sweep.points import Point
from based_jax.sweep.rows import facts_of
from based_jax.sweep.trial import load_sweep
from experiments.lm_recall import questions, sweeps
from experiments.lm_recall.training import NoTimeLeft, Run

FOLDER = Path(__file__).parent
SWEEPS, STORE, QUESTIONS = FOLDER / "sweeps.py", FOLDER / "results" / "runs", Path("runs/lm_recall/questions.jsonl.xz")
SECONDS_BETWEEN_LOOKS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--sweep", default=f"{SWEEPS}:study", help="file:variant (default: the study)")
    parser.add_argument("--store", default=STORE, help="folder of the rows (default: results/runs)")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="file that `prepare` has made")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="by which runs are to be trained (default: any)"
    )
    parser.add_argument("--ready", type=int, default=8, help="runs that get ready at a time (default: 8)")


def run(args: argparse.Namespace) -> int:
    """Start a process for each run; return 1 if one has failed."""
    until = time.time() + args.seconds
    store, sweep = Store(args.store), load_sweep(args.sweep)
    store.check_writable()
    if args.ready < 1:
        raise UserError(f"--ready is {args.ready}; it is at least 1.")
    questions.read(args.questions)
    ids = store.ids()
    left = [place for place, (_, config) in enumerate(sweep.trials()) if config.id not in ids]
    print(f"{len(sweep.trials()) - len(left)} of {len(sweep.trials())} runs have rows.", flush=True)
    failed = _work_off(left, args, until)
    print(f"{len({config.id for _, config in sweep.trials()} & store.ids())} runs have rows now.", flush=True)
    return int(failed)


def _work_off(places: list[int], args: argparse.Namespace, until: float) -> bool:
    """Keep `args.ready` processes, and return whether one has failed."""
    context, failed = multiprocessing.get_context("spawn"), False
    running: list[multiprocessing.process.BaseProcess] = []
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


def _train_point(spec: str, place: int, store_path: str, asked: Path, until: float, command: str) -> None:
    """Get a run ready, wait for the device, and write its row if there is time for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends of it, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    compilation.keep()
    begin, (point, config) = time.time(), load_sweep(spec).trials()[place]
    name, store = _title(point, place), Store(store_path)

    def tell(text: str) -> None:
        print(f"[{time.time() - begin:5.0f} s] {name}: {text}", flush=True)

    try:
        with Claims(store) as claims:
            if not claims.take(config.id):
                return tell("left to another command, which has claimed it")
            run, device = Run(point, config, questions.read(asked)), DeviceLock(jax.devices()[0])
            tell(f"ready after {run.seconds_to_prepare:.0f} s")
            with device:
                if config.id in store.ids():
                    return tell("it has a row by now")
                if time.time() >= until:
                    raise NoTimeLeft("the time is over")
                run.train(tell, until)
            run.wait()
            with device:
                row = run.row()
                store.append(row | facts_of(name_of(spec), command) | {"model": sweeps.name_of(point)})
        tell(f"{row['status']} after {row['seconds']:.0f} s, perplexity {row['perplexity']}")
    except NoTimeLeft as error:
        tell(f"left for the next time: {error}")
        os._exit(0)  # a thread that compiles would be waited for
    except Exception:
        traceback.print_exc()
        tell("FAILED")
        sys.exit(1)


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, however it did: the device is for the next command."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _title(point: Point, place: int) -> str:
    """Return the name of a point's model, its rate and its seed."""
    return f"{sweeps.name_of(point, f'model {place}')}, lr {point.get('optim.lr')}, seed {point.get('seed')}"

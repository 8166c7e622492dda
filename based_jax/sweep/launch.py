"""Where a sweep runs: on this machine, over a Ray cluster, or as a SLURM array; all share the store alone."""

import dataclasses
import functools
import multiprocessing
import multiprocessing.pool
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from based_jax.errors import UserError
from based_jax.store import Store
from based_jax.sweep.lane_engine import LaneEngine
from based_jax.sweep.runs import RunEngine
from based_jax.sweep.schedule import Engine, Progress, SweepOptions, Todo
from based_jax.sweep.trial import Sweep, Trial, load_sweep
from based_jax.train.run import RunConfig, TrainConfig

ENGINES: dict[type[RunConfig], type[Engine]] = {Trial: LaneEngine, TrainConfig: RunEngine}
print_at_once = functools.partial(print, flush=True)


def run_sweep(
    sweep: Sweep, store: Store, name: str, options: SweepOptions, report: Callable[[str], None] = print
) -> int:
    """Train every point that the store has no row of on the devices of this process; return how many were trained.

    A group that fails is reported and leaves the others alone; its points have no row and are tried again next time.

    Raises:
      UserError: a point is impossible; nothing has been trained then.
      RuntimeError: groups have failed, after all others have been trained.
    """
    engine = ENGINES[sweep.config_class]()
    progress = Progress(Todo(functools.partial(engine.groups, sweep), store, options.part), store, report)
    engine.train(progress, name, options)
    return progress.count


def local(spec: str, store: str, options: SweepOptions) -> int:
    """Run a sweep on the devices of this process; return how many points were trained.

    Raises:
      UserError: a point is impossible; nothing has been trained then.
      RuntimeError: groups have failed, after all others have been trained.
    """
    return run_sweep(load_sweep(spec), Store(store), name_of(spec), options, print_at_once)


def in_processes(spec: str, store: str, options: SweepOptions, *, processes: int) -> None:
    """Run a sweep on the devices of this machine in several processes, each with one GPU where there are any.

    A process traces one program at a time, which takes longer than to train small models. Examples are made once. A
    process has one group under way, unless the options say otherwise, and takes the next one when it is done.

    Raises:
      UserError: a point is impossible.
      RuntimeError: a process has failed, after all others have ended.
    """
    gpus, fork, sweep = visible_gpus(), multiprocessing.get_context("fork"), load_sweep(spec)
    engine = ENGINES[sweep.config_class]()
    todo = Todo(functools.partial(engine.groups, sweep), Store(store), options.part)
    with forked_pool(processes) as pool:
        engine.prepare(sweep, pool.starmap)
    threads = min(options.compiler_threads, max(2, (os.cpu_count() or 1) // processes))
    options = dataclasses.replace(options, compiler_threads=threads, workers=options.workers or 1)
    children = []
    for i in range(processes):
        gpu = gpus[i % len(gpus)] if gpus else None
        children.append(fork.Process(target=_work, args=(engine, todo, store, name_of(spec), options, gpu)))
    try:
        for process in children:
            process.start()
        for process in children:
            process.join()
    except BaseException:
        for process in children:
            process.kill()  # rows are on the disk
        raise
    if failed := sum(bool(process.exitcode) for process in children):
        raise RuntimeError(f"{failed} of {processes} processes have failed.")


def forked_pool(processes: int) -> multiprocessing.pool.Pool:
    """Return forked processes that SIGTERM, a pool's end, ends at once.

    As an exception of Python, which the command makes of it, it can come right before a wait and is then never seen.
    One that comes before a process is ready for it waits until then.
    """
    fork = multiprocessing.get_context("fork")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return fork.Pool(processes, _end_at_once)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_at_once() -> None:
    """Let SIGTERM end this process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _work(engine: Engine, todo: Todo, store: str, name: str, options: SweepOptions, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    engine.train(Progress(todo, Store(store), print_at_once), name, options)


def visible_gpus() -> list[str]:
    """Return what CUDA calls the GPUs that this process may use, without making use of one."""
    if (names := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in names.split(",") if name]
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return []
    return found.stdout.split() if found.returncode == 0 else []


def on_ray(spec: str, store: str, options: SweepOptions, *, tasks: int) -> int:
    """Run a sweep in `tasks` parts on a Ray cluster, one accelerator for each where the cluster has any.

    The store's folder and the sweep file must be there on every machine.

    Raises:
      UserError: Ray is not installed, or a point is impossible.
    """
    try:
        import ray  # optional
    except ImportError:
        raise UserError("--launcher=ray needs Ray; install based-jax[ray].") from None
    load_sweep(spec)  # what is impossible is refused before anything is started
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=True)
    remote = ray.remote(num_cpus=1, num_gpus=int("GPU" in ray.cluster_resources()))(local)
    store, spec = os.path.abspath(store), _absolute(spec)
    parts = [dataclasses.replace(options, part=(i, tasks)) for i in range(tasks)]
    return sum(ray.get([remote.remote(spec, store, part) for part in parts]))


def on_slurm(spec: str, store: str, options: SweepOptions, *, tasks: int, script: str | None) -> int:
    """Write an array job of `tasks` parts, and submit it unless a path for the script is given; return 0.

    Raises:
      UserError: a point is impossible, or there is no sbatch to submit with.
    """
    load_sweep(spec)
    text = job(_absolute(spec), os.path.abspath(store), options, tasks)
    if script:
        Path(script).write_text(text)
        print(f"Submit it with: sbatch {script}")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("--launcher=slurm needs sbatch on the PATH; with --script=FILE the job is written instead.")
    subprocess.run(["sbatch"], input=text, text=True, check=True)
    return 0


def job(spec: str, store: str, options: SweepOptions, tasks: int) -> str:
    """Return the array job; partition, account and time limit are sbatch's own options or variables."""
    words = [
        sys.executable,
        "-m",
        "based_jax",
        "sweep",
        "run",
        spec,
        f"--store={store}",
        f"--lanes={options.max_lanes}",
    ]
    words += [f"--workers={options.workers}"] if options.workers else []
    command = f'{shlex.join(words)} --part="$SLURM_ARRAY_TASK_ID/{tasks}"'
    head = ["#!/bin/sh", f"#SBATCH --job-name={name_of(spec)}", f"#SBATCH --array=0-{tasks - 1}", "#SBATCH --gpus=1"]
    # A task that was stopped is queued again and goes on where the store says it was.
    return "\n".join([*head, "#SBATCH --requeue", f"cd {shlex.quote(os.getcwd())}", command, ""])


def name_of(spec: str) -> str:
    """Return what rows call a sweep: its variant, or its file's name."""
    path, _, variant = spec.partition(":")
    return variant or Path(path).stem


def _absolute(spec: str) -> str:
    path, colon, variant = spec.partition(":")
    return os.path.abspath(path) + colon + variant

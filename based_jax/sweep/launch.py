"""Where a sweep runs: on this machine, over a Ray cluster, or as a SLURM array; all share the store alone."""

import dataclasses
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from based_jax import devices
from based_jax.errors import UserError, installs
from based_jax.folders import writing
from based_jax.store import Store
from based_jax.sweep.checks import reason
from based_jax.sweep.claims import Claims
from based_jax.sweep.lane_engine import LaneEngine
from based_jax.sweep.processes import FORK_CONTEXT, checked_apart, forked_pool
from based_jax.sweep.runs import RunEngine
from based_jax.sweep.schedule import (
    SECONDS_BETWEEN_SIGNALS,
    Engine,
    Progress,
    SweepFailedError,
    SweepOptions,
    Todo,
    unfinished,
)
from based_jax.sweep.trial import Sweep, Trial, load_sweep
from based_jax.train.run import RunConfig, TrainConfig

ENGINES: dict[type[RunConfig], type[Engine]] = {Trial: LaneEngine, TrainConfig: RunEngine}
print_at_once = functools.partial(print, flush=True)


def run_sweep(
    sweep: Sweep, store: Store, name: str, options: SweepOptions, report: Callable[[str], None] = print
) -> int:
    """Train every point that the store has no row of on the devices of this process; return how many were trained.

    Other commands may fill the same store: each group is trained by one of them, and this returns when all points have
    rows. A group that fails is reported and leaves the others alone; its points have no row and are tried again next
    time.

    Raises:
      UserError: a point is impossible, or the store cannot be written; nothing has been trained then.
      StoreError: a row cannot be written.
      SweepFailedError: groups have failed, after all others have been trained.
    """
    engine = ENGINES[sweep.config_class](sweep)
    if left := _left(sweep, store, report):
        engine.check(left)
    todo = Todo(engine.groups(), store, options.part)
    options = _of_use(options, todo)
    _tell(todo, options, report, lambda: engine.place(options))
    progress = Progress(todo, store, report, options.until)
    if todo.groups:
        engine.train(progress, name, options)
        _tell_end(sweep, store, report)
    return progress.count


def local(spec: str, store: str, options: SweepOptions) -> int:
    """Run a sweep on the devices of this process; return how many points were trained; errors as of `run_sweep`."""
    return run_sweep(load_sweep(spec), Store(store), name_of(spec), options, print_at_once)


def in_processes(spec: str, store: str, options: SweepOptions, *, processes: int) -> None:
    """Run a sweep on the devices of this machine in several processes, each with one GPU where there are any.

    A process traces one program at a time, which takes longer than to train small models. Examples are made once. A
    process has one group under way, unless the options say otherwise, and takes the next one when it is done.

    Raises:
      UserError, StoreError: as `run_sweep`.
      SweepFailedError: a process has failed, after all others have ended.
    """
    gpus, sweep, rows = visible_gpus(), load_sweep(spec), Store(store)
    engine = ENGINES[sweep.config_class](sweep)
    left = _left(sweep, rows, print_at_once)
    if left:
        checked_apart(FORK_CONTEXT, engine.check, left)  # the devices are for the processes
    todo = Todo(engine.groups(), rows, options.part)
    processes, options = min(processes, max(len(todo.groups), 1)), _of_use(options, todo)
    places = [gpus[i % len(gpus)] if gpus else None for i in range(processes)]
    on = f"on {len(set(places))} GPUs" if gpus else "without a GPU"
    _tell(todo, options, print_at_once, lambda: f"in {processes} processes {on}")
    if todo.groups:
        with forked_pool(processes) as pool:
            engine.prepare(left, pool.starmap)
        threads = min(options.compiler_threads, max(2, (os.cpu_count() or 1) // processes))
        options = dataclasses.replace(options, compiler_threads=threads, workers=options.workers or 1)
        todo.sharers = len(set(places)) if sweep.config_class is Trial else processes
        _run_in_processes(
            rows, [(engine, todo, store, name_of(spec), options, environment_of(gpu, places)) for gpu in places]
        )
        _tell_end(sweep, rows, print_at_once)


def _run_in_processes(store: Store, calls: list[tuple]) -> None:
    """Call `_work` in forked processes, and leave none of them nor of their claims when interrupted."""
    told = FORK_CONTEXT.SimpleQueue()
    children = [FORK_CONTEXT.Process(target=_work, args=(told.put, *call)) for call in calls]
    try:
        for process in children:
            process.start()
        while any(process.is_alive() for process in children):  # in short waits: see `work_off`
            for process in children:
                process.join(SECONDS_BETWEEN_SIGNALS)
    finally:
        for process in children:
            if process.is_alive():
                process.kill()  # rows are on the disk
        for process in children:
            if process.pid is not None:
                process.join()
        Claims(store).clear()
    if failed := sum(bool(process.exitcode) for process in children):
        error, text = (SweepFailedError, "") if told.empty() else told.get()
        if issubclass(error, UserError):
            raise error(text)
        raise SweepFailedError(f"{failed} of {len(children)} processes have failed{text and ': '}{text or '.'}")


def _left(sweep: Sweep, store: Store, report: Callable[[str], None]) -> list[tuple[Any, RunConfig]]:
    """Return the points that have no row, after a word on those that are given twice and a look at the store."""
    points = sweep.trials()
    if twice := len(sweep.points) - len(points):
        report(f"{twice} of {len(sweep.points)} points come to the same config as another one, and are trained once.")
    store.check_writable()
    return unfinished(sweep, store)


def _of_use(options: SweepOptions, todo: Todo) -> SweepOptions:
    """Return the options with no more workers than there are groups."""
    if options.workers is None:
        return options
    return dataclasses.replace(options, workers=min(options.workers, max(len(todo.groups), 1)))


def _tell(todo: Todo, options: SweepOptions, report: Callable[[str], None], place: Callable[[], str]) -> None:
    """Say what is there and what is to be done."""
    part, parts = options.part
    of = f" of part {part}/{parts}" if parts > 1 else ""
    left = f"; {todo.total} are left, in {len(todo.groups)} groups, {place()}" if todo.groups else ""
    report(f"{todo.finished} of {todo.finished + todo.total} points{of} have rows{left}.")


def _tell_end(sweep: Sweep, store: Store, report: Callable[[str], None]) -> None:
    """Say after training what the store has."""
    points = sweep.trials()
    report(f"{len(points) - len(unfinished(sweep, store))} of {len(points)} points have rows.")


def _work(
    tell: Callable[[tuple[type[Exception], str]], None],
    engine: Engine,
    todo: Todo,
    store: str,
    name: str,
    options: SweepOptions,
    environment: dict[str, str],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent ends this one
    os.environ |= environment
    try:
        engine.train(Progress(todo, Store(store), print_at_once, options.until), name, options)
    except (UserError, SweepFailedError) as error:
        tell((type(error), str(error)))
        sys.exit(1)
    except KeyboardInterrupt:  # a scheduler asks all processes
        os._exit(130)


def environment_of(gpu: str | None, places: Sequence[str | None]) -> dict[str, str]:
    """Return the environment of a process that has this GPU, if any, beside others with GPUs of `places`."""
    if gpu is None:
        return {}
    return devices.memory_share(places.count(gpu)) | dict(os.environ) | {"CUDA_VISIBLE_DEVICES": gpu}


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
        raise UserError(f"--launcher=ray needs Ray; {installs('ray')} brings it.") from None
    _left(load_sweep(spec), Store(store), print_at_once)  # what is impossible is refused before anything is started
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        try:
            ray.init(address=address, log_to_driver=True)
        except ConnectionError as error:
            raise UserError(f"There is no Ray cluster at '{address}', of RAY_ADDRESS: {reason(error)}") from error
    remote = ray.remote(num_cpus=1, num_gpus=int("GPU" in ray.cluster_resources()))(local)
    store, spec = os.path.abspath(store), _absolute(spec)
    parts = [dataclasses.replace(options, part=(i, tasks)) for i in range(tasks)]
    try:
        return sum(ray.get([remote.remote(spec, store, part) for part in parts]))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def on_slurm(spec: str, store: str, options: SweepOptions, *, tasks: int, script: str | None) -> int:
    """Write an array job of `tasks` parts, and submit it unless a path for the script is given; return 0.

    Raises:
      UserError: a point is impossible, the store or the script cannot be written, or sbatch is not there or refuses.
    """
    _left(load_sweep(spec), Store(store), print_at_once)
    text = job(_absolute(spec), os.path.abspath(store), options, tasks)
    if script:
        with writing(script):
            Path(script).write_bytes(os.fsencode(text))
        print(f"Submit it with: sbatch {script}")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("--launcher=slurm needs sbatch on the PATH; with --script=FILE the job is written instead.")
    done = subprocess.run(["sbatch"], input=text, text=True, stderr=subprocess.PIPE)
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {' '.join(done.stderr.split()).rstrip('.')}.")
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

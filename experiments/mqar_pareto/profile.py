"""Where a step's time goes: milliseconds of a step of the sweep's own program, and the kernels that take most of it.

One row per model, on one training segment, timed alone and then under the profiler.
"""

import argparse
import collections
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from based_jax.revision import revision
from based_jax.sweep import lanes
from based_jax.sweep.device_lock import DeviceLock
from based_jax.sweep.trial import make_trial
from experiments.mqar_pareto import sweeps

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "based_64": sweeps.based(64, 16),
    "based_128": sweeps.based(128, 16),
    "based_256": sweeps.based(256, 16),
    "window_128": sweeps.window(64),
    "attention_64": sweeps.FIGURE2["attention"][:1],
    "mamba_128": sweeps.mamba(128, "mamba", 16),
    "mamba_256": sweeps.mamba(256, "mamba", 16),
    **{
        f"{name}_{point['model.d_model']}": [point]
        for name, space in sweeps.FIGURE2.items()
        if name not in ("based", "window", "attention", "mamba")
        for point in space[1:]
    },
}
TIMED_STEPS = 30
TRACED_STEPS = 10
KERNELS_PER_ROW = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, default=RESULTS / "profile.jsonl", help="JSON lines; appended to")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--impl", default="auto", help="of the last mixer's operation (default: auto)")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--segment", type=int, default=4, help="training segment, by its place (default: 4, 256x64)")


def run(args: argparse.Namespace) -> int:
    """Print and write a row per model."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    facts = {"device": jax.devices()[0].device_kind, "versions": versions, "revision": revision()}
    facts["command"] = f"python -m experiments.mqar_pareto {' '.join(sys.argv[1:])}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        for name in args.models:
            point = with_impl(MODELS[name][0], args.impl)
            row = {"model": name, "impl": args.impl} | measure(point, args.segment, args.lanes) | facts
            spent = f"{row['milliseconds']:8.3f} ms, {row['kernel_milliseconds']:.3f} in {row['kernels']:.0f} kernels"
            print(f"{name:20} {spent}", flush=True)
            for kernel, milliseconds, calls in row["top"]:
                print(f"    {milliseconds:8.4f} ms {calls:6.1f} x {kernel[:80]}")
            print(json.dumps(row), file=file, flush=True)
    return 0


def with_impl(point: dict, impl: str) -> dict:
    """Return the point with an implementation for the operation of its last mixer, in all layers that have it."""
    last, _ = point["model.layers"][-1]
    found = [(kind, options | {"impl": impl} if kind == last else options) for kind, options in point["model.layers"]]
    return point | {"model.layers": tuple(found)}


def measure(point: dict, segment: int, number: int) -> dict:
    """Return a model's row."""
    trial = make_trial(sweeps.BASE, point)
    source, program = trial.data.open(trial.batch_size), lanes.Lanes(trial, number)
    examples = lanes.PlacedExamples.of(*source.examples("train", segment))
    begin = time.perf_counter()
    train = program.training(examples).call
    compiled = time.perf_counter() - begin
    held = [program.beginning().call(jnp.arange(number, dtype=jnp.uint32))]
    rates = lanes.Rates(*(jnp.full(number, x) for x in (trial.optim.lr, trial.optim.weight_decay)))
    most = lanes.MAX_STEPS_PER_DISPATCH
    rows = jnp.arange(most * trial.batch_size, dtype=jnp.int32).reshape(most, -1)

    def take(steps: int) -> None:
        held[0], losses = train(held[0], rates, examples, rows % examples.inputs.shape[0], jnp.int32(steps))
        jax.block_until_ready(losses)

    with DeviceLock(jax.devices()[0]):  # several of these commands may share a GPU
        take(1)
        begin = time.perf_counter()
        take(TIMED_STEPS)
        milliseconds = 1e3 * (time.perf_counter() - begin) / TIMED_STEPS
        times = kernel_times(lambda: take(TRACED_STEPS))
    per_step = ((name, sum(x) / TRACED_STEPS, len(x) / TRACED_STEPS) for name, x in times.items())
    top = sorted(per_step, key=lambda x: -x[1])
    return {
        "segment": trial.data.resolved.train[segment].name,
        "lanes": number,
        "milliseconds": round(milliseconds, 4),
        "kernel_milliseconds": round(sum(spent for _, spent, _ in top), 4),
        "kernels": sum(calls for *_, calls in top),
        "compile_seconds": round(compiled, 2),
        "top": [(name, round(spent, 4), calls) for name, spent, calls in top[:KERNELS_PER_ROW]],
    }


def kernel_times(call: Callable[[], None]) -> dict[str, list[float]]:
    """Return the milliseconds of each launch of each kernel of a call, by name; nothing where there is no GPU."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        [file] = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    times[event.name].append(event.duration_ns / 1e6)
    return times

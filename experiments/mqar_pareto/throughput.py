"""Steps per second of the Figure 2 recipe, from a plain loop to the sweep's lanes: what each change buys, and where.

One row per model, training segment and way of running: "loop" (a dispatch for each step, batches from the host, logits
at every position), "answers" (logits at the asked positions alone), "fused" (with their softmax in one operation),
"resident" (examples on the device, 100 steps a dispatch), "lanes" (several trials in one program).
"""

import argparse
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from based_jax.dims import DropoutKey
from based_jax.labels import is_labelled
from based_jax.nn.lm import LM
from based_jax.nn.loss import Sums, position_sums
from based_jax.optim import optimizer
from based_jax.revision import revision
from based_jax.sweep import Trial, lanes
from based_jax.sweep.device_lock import DeviceLock
from based_jax.sweep.trial import make_trial
from based_jax.train.step import TrainState, initial_state, make_train_step
from experiments.mqar_pareto import sweeps

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "based_64": sweeps.based(64, 16),
    "based_128": sweeps.based(128, 16),
    "based_256": sweeps.based(256, 16),
    "window_128": sweeps.window(64),
    "gated_deltanet_128": sweeps.gated_deltanet(128),
    "mamba_128": sweeps.mamba(128, "mamba", 16),
}
LANE_COUNTS = 4, 8
EXAMPLES_PER_SEGMENT = 4096
"""Enough that no cache holds them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.jsonl", help="JSON lines; appended to")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--lanes", nargs="+", type=int, default=LANE_COUNTS)
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each measurement")
    parser.add_argument("--segments", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="training segments, by place")
    parser.add_argument("--dtype", default="bfloat16", help="that layers compute in")


def run(args: argparse.Namespace) -> int:
    """Print and write a row per measurement."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    facts = {"device": jax.devices()[0].device_kind, "versions": versions, "revision": revision()}
    facts["command"] = f"python -m experiments.mqar_pareto {' '.join(sys.argv[1:])}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        for name, segment in itertools.product(args.models, args.segments):
            trial = make_trial(sweeps.BASE, MODELS[name][0] | {"model.dtype": args.dtype})
            for row in measure(trial, segment, args.lanes, args.steps):
                row = {"model": name, "dtype": args.dtype} | row | facts
                print(line(row), flush=True)
                print(json.dumps(row), file=file, flush=True)
    return 0


def measure(trial: Trial, segment: int, numbers: list[int], steps: int) -> Iterator[dict]:
    """Yield a row for each way of training on a segment."""
    found = trial.data.resolved.train[segment]
    source = trial.data.open(trial.batch_size)
    examples = [x[:EXAMPLES_PER_SEGMENT] for x in source.examples("train", segment)]
    place = {"segment": found.name, "steps_per_epoch": -(-found.num_examples // trial.batch_size)}
    for way in LOSS_SUMS:
        yield place | {"way": way, "lanes": 1} | timed(lambda way=way: looped(trial, examples, way), steps)
    for number in [1, *numbers]:
        way = "lanes" if number > 1 else "resident"
        yield place | {"way": way, "lanes": number} | timed(lambda n=number: resident(trial, examples, n), steps)


def timed(prepare: Callable[[], Callable[[int], object]], steps: int) -> dict:
    """Return the seconds of preparation (compilation) and milliseconds of a step; `prepare()(n)` takes n steps."""
    begin = time.perf_counter()
    try:
        take = prepare()
        compiled = time.perf_counter() - begin
        with DeviceLock(jax.devices()[0]):  # several of these commands may share a GPU
            jax.block_until_ready(take(10))
            begin = time.perf_counter()
            jax.block_until_ready(take(steps))
            seconds = time.perf_counter() - begin
    except Exception as error:  # too many lanes for the memory: the other rows are still worth measuring
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {
        "compile_seconds": round(compiled, 2),
        "milliseconds": round(1e3 * seconds / steps, 4),
    }


def looped(trial: Trial, examples: list[np.ndarray], way: str) -> Callable[[int], object]:
    """Return a loop with one dispatch for each step and batches from the host."""
    inputs, labels = examples
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LM(trial.model, rngs=nnx.Rngs(0))))
    tx = optimizer(trial.optim, trial.steps)
    state = jax.jit(lambda key: initial_state(LM(trial.model, rngs=nnx.Rngs(key)), tx, key))(jax.random.key(0))
    least = labels.shape[1] if way == "loop" else 1
    ends = range(trial.batch_size, len(inputs) + 1, trial.batch_size)
    cuts = [slice(end - trial.batch_size, end) for end in ends]
    batches = [jax.device_get(lanes.PlacedExamples.of(inputs[cut], labels[cut], least)) for cut in cuts]

    def step(state: TrainState, batch: lanes.PlacedExamples):
        state, metrics = make_train_step(graphdef, tx, sums_of=LOSS_SUMS[way])(state, batch)
        return state, metrics["loss"]

    compiled = jax.jit(step, donate_argnums=0).lower(state, jax.tree.map(jnp.asarray, batches[0])).compile()
    held = [state]

    def take(number: int):
        for i in range(number):
            batch = jax.device_put(batches[i % len(batches)])
            held[0], loss = compiled(held[0], batch)
        return loss

    return take


def plain_sums(model: LM, batch: lanes.PlacedExamples, dropout_key: DropoutKey | None = None) -> Sums:
    """Return the sums of the answers, their cross-entropy as optax takes it from logits."""
    hidden, answers = model.hidden(batch.inputs, dropout_key=dropout_key), batch.answers
    if answers.shape != batch.inputs.shape:
        hidden = jnp.take_along_axis(hidden, batch.where[..., None], axis=1)
    logits, asked = model.logits(hidden), is_labelled(answers)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(asked, answers, 0))
    return position_sums(jnp.where(asked, losses, 0.0), jnp.argmax(logits, axis=-1) == answers, answers)


LOSS_SUMS = {"loop": plain_sums, "answers": plain_sums, "fused": lanes.answer_sums}


def resident(trial: Trial, examples: list[np.ndarray], number: int) -> Callable[[int], object]:
    """Return the sweep's own program for so many lanes."""
    program = lanes.Lanes(trial, number)
    placed = lanes.PlacedExamples.of(*examples)
    train = program.training(placed).call
    states = program.beginning().call(jnp.arange(number, dtype=jnp.uint32))
    rates = lanes.Rates(*(jnp.full(number, x) for x in (trial.optim.lr, trial.optim.weight_decay)))
    most = lanes.MAX_STEPS_PER_DISPATCH
    rows = jnp.arange(most * trial.batch_size, dtype=jnp.int32).reshape(most, -1) % len(examples[0])
    held = [states]

    def take(steps: int):
        for first in range(0, steps, most):
            count = jnp.int32(min(most, steps - first))
            held[0], losses = train(held[0], rates, placed, rows, count)
        return losses

    return take


def line(row: dict) -> str:
    """Return a row in one line of print."""
    start = f"{row['model']:20} {row['dtype']:8} {row['segment']:7} {row['way']:9} {row['lanes']:2}"
    if "error" in row:
        return f"{start} {row['error']}"
    rate = 1e3 * row["lanes"] / row["milliseconds"]
    return (
        f"{start} {row['milliseconds']:9.3f} ms {rate:9.0f} trial-steps/s, compiled in {row['compile_seconds']:.1f} s"
    )

"""What bf16 moments cost, by how they are rounded, and what Muon brings, on the shipped prose.

    python -m experiments.optimizers [--steps=200] [--out=results/runs.jsonl]

A row a run: `configs/text_tiny.py` with fewer channels, by optimizer, decay of the second moment, what moments are kept
in and how they are rounded to it, and seed. "nearest" is here alone; `optim.moment_dtype` rounds at random.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from based_jax import load_config
from based_jax.nn.lm import LM
from based_jax.nn.loss import loss_sums
from based_jax.optim import optimizer
from based_jax.sweep.rows import revision
from based_jax.train.run import TrainConfig
from based_jax.train.step import initial_state, make_train_step

RESULTS = Path(__file__).parent / "results"
D_MODEL, BATCH = 64, 8
EVAL_BATCHES = 16
VARIANTS = [
    ("adamw", 0.95, "float32", "none"),
    ("adamw", 0.95, "bfloat16", "nearest"),
    ("adamw", 0.95, "bfloat16", "random"),
    ("adamw", 0.999, "float32", "none"),
    ("adamw", 0.999, "bfloat16", "nearest"),
    ("adamw", 0.999, "bfloat16", "random"),
    ("muon", 0.95, "float32", "none"),
    ("muon", 0.95, "bfloat16", "random"),
]
"""Optimizer, decay of the second moment, dtype of the moments, and how they are rounded to it."""


def rounded_to_nearest(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return an optimizer whose moments are kept in the bf16 numbers that are nearest."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, jnp.bfloat16)

    return optax.GradientTransformation(lambda params: cast(tx.init(params), jnp.bfloat16), update)


def run(name: str, decay: float, dtype: str, rounding: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the row of a run: losses in nats a byte, of the last tenth of its steps and of the held-out text."""
    kept = "float32" if rounding == "nearest" else dtype
    optim = {"optim.name": name, "optim.betas": (0.9, decay), "optim.moment_dtype": kept, "optim.warmup_steps": 20}
    sizes = {"model.d_model": D_MODEL, "batch_size": BATCH, "steps": steps, "seed": seed}
    config = load_config("configs/text_tiny.py", {**sizes, **optim})
    tx = optimizer(config.optim, steps)
    begin, (losses, held_out) = (
        time.perf_counter(),
        _trained(config, rounded_to_nearest(tx) if rounding == "nearest" else tx),
    )
    return {
        "optimizer": name,
        "decay": decay,
        "moments": dtype,
        "rounding": rounding,
        "seed": seed,
        "steps": steps,
        "loss": round(float(np.mean(losses[-steps // 10 :])), 4),
        "held_out": round(held_out, 4),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _trained(config: TrainConfig, tx: optax.GradientTransformation) -> tuple[list[float], float]:
    source = config.data.open(config.batch_size)
    model = nnx.jit(lambda: LM(config.model, rngs=nnx.Rngs(config.seed)))()
    graphdef, state = nnx.graphdef(model), initial_state(model, tx)
    step = jax.jit(make_train_step(graphdef, tx), donate_argnums=0)
    losses = []
    for i in range(config.steps):
        state, metrics = step(state, source.batch(i + config.steps * config.seed))
        losses.append(float(metrics["loss"]))
    sums = jax.jit(lambda params, batch: loss_sums(nnx.merge(graphdef, params), batch))
    batches = [batch for _, batch in zip(range(EVAL_BATCHES), source.eval_batches("validation"), strict=False)]
    found = [sums(state.params, batch) for batch in batches]
    return losses, float(sum(x["loss"] for x in found) / sum(x["count"] for x in found))


def rows(steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each variant and seed."""
    facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "revision": revision()}
    for seed in range(seeds):
        for variant in VARIANTS:
            yield run(*variant, seed=seed, steps=steps) | facts | {"command": " ".join(["python -m", *_command()])}


def _command() -> list[str]:
    return ["experiments.optimizers", *sys.argv[1:]]


def main() -> None:
    """Write a row per run, as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "runs.jsonl", help="JSON lines; appended to")
    args = parser.parse_args()
    for row in rows(args.steps, args.seeds):
        print(row)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

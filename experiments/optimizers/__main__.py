"""What bf16 moments cost, by how they are rounded, and what Muon brings at AdamW's learning rate.

    python -m experiments.optimizers moments    # a second moment whose gradients become smaller
    python -m experiments.optimizers runs       # a small model on the shipped prose

Rows are appended to `results/moments.jsonl` and `results/runs.jsonl`. Rounding to the "nearest" is here alone:
`optim.moment_dtype` rounds at "random".
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
from based_jax.optim import OptimConfig, optimizer
from based_jax.revision import revision
from based_jax.train.run import TrainConfig
from based_jax.train.step import initial_state, make_train_step

RESULTS = Path(__file__).parent / "results"
D_MODEL, BATCH, EVAL_BATCHES = 64, 8, 16
KEPT = [("float32", "none"), ("bfloat16", "nearest"), ("bfloat16", "random")]
"""What moments are kept in, and how they are rounded to it."""
RUNS = [("adamw", decay, *kept) for decay in (0.95, 0.999) for kept in KEPT] + [
    ("muon", 0.95, *kept) for kept in (KEPT[0], KEPT[2])
]
"""Optimizer, decay of the second moment, and as `KEPT`."""


def rounded_to_nearest(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return an optimizer whose moments are kept in the bf16 numbers that are nearest."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, jnp.bfloat16)

    return optax.GradientTransformation(lambda params: cast(tx.init(params), jnp.bfloat16), update)


def kept_as(config: OptimConfig, steps: int, rounding: str) -> optax.GradientTransformation:
    """Return the optimizer of a config, in fp32 where its moments are rounded to the nearest by what is here."""
    return rounded_to_nearest(optimizer(config, steps)) if rounding == "nearest" else optimizer(config, steps)


def moments(steps: int) -> Iterator[dict[str, Any]]:
    """Yield rows of 512 second moments after Gaussian gradients, ten times smaller from half of the steps on."""
    for decay in (0.95, 0.99, 0.999):
        exact = None
        for dtype, rounding in KEPT:
            config = OptimConfig(
                betas=(0.9, decay),
                schedule="constant",
                clip_norm=None,
                moment_dtype="float32" if rounding == "nearest" else dtype,
            )
            found = _second_moments(kept_as(config, steps, rounding), steps)
            exact = found if exact is None else exact
            error = found / exact - 1
            yield {
                "decay": decay,
                "moments": dtype,
                "rounding": rounding,
                "steps": steps,
                "mean_over_fp32": round(float(1 + error.mean()), 4),
                "rms_error": round(float(np.sqrt((error**2).mean())), 4),
            }


def _second_moments(tx: optax.GradientTransformation, steps: int) -> np.ndarray:
    params = {"kernel": jnp.zeros(512)}

    def update(state: Any, step: jax.Array) -> tuple[Any, None]:
        scale = jnp.where(step < steps // 2, 1.0, 0.1)
        grads = {"kernel": scale * jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (512,))}
        return tx.update(grads, state, params)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(update, state, jnp.arange(steps)))(tx.init(params))
    return np.asarray(optax.tree.get(state, "nu")["kernel"], np.float64)


def runs(steps: int, seeds: int, lr: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each of `RUNS` and seed: losses in nats a byte, of the last tenth of the steps and held out."""
    for seed in range(seeds):
        for name, decay, dtype, rounding in RUNS:
            kept = "float32" if rounding == "nearest" else dtype
            optim = {"optim.name": name, "optim.betas": (0.9, decay), "optim.moment_dtype": kept, "optim.lr": lr}
            sizes = {"model.d_model": D_MODEL, "batch_size": BATCH, "steps": steps, "seed": seed}
            config = load_config("configs/text_tiny.py", {**sizes, **optim})
            begin = time.perf_counter()
            losses, held_out = _trained(config, kept_as(config.optim, steps, rounding))
            yield {
                "optimizer": name,
                "lr": lr,
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
    """Return the loss of each step, and that of held-out text after the last one."""
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


def main() -> None:
    """Write each row as it is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["moments", "runs"])
    parser.add_argument("--steps", type=int, default=200, help="of a run; of moments twenty times as many")
    parser.add_argument("--seeds", type=int, default=2, help="of runs")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of runs")
    args = parser.parse_args()
    found = moments(20 * args.steps) if args.what == "moments" else runs(args.steps, args.seeds, args.lr)
    command = " ".join(["python -m experiments.optimizers", *sys.argv[1:]])
    facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "revision": revision(), "command": command}
    for row in found:
        print(row, flush=True)
        with (RESULTS / f"{args.what}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | facts) + "\n")


if __name__ == "__main__":
    main()

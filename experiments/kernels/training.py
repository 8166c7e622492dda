"""The same two-layer model trained with each implementation of Taylor attention, on one GPU."""

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from based_jax import config as configs
from based_jax.revision import revision
from based_jax.train import loop
from based_jax.train.run import TrainConfig
from experiments.kernels import results

TRAINED_IMPLS = "hopper", "xla", "oracle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, default=results.FOLDER / "training.jsonl", help="JSON lines; replaced")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--impls", nargs="+", default=TRAINED_IMPLS)


def run(args: argparse.Namespace) -> int:
    """Train."""
    train(args.out, args.steps, args.impls)
    return 0


def train(out: Path, steps: int, impls) -> None:
    """Write the loss of every step of each run, and print how far the runs are from the XLA one."""
    facts = {"device": jax.devices()[0].device_kind, "versions": {"jax": importlib.metadata.version("jax")}}
    facts |= {"revision": revision(), "command": "python -m experiments.kernels " + " ".join(sys.argv[1:])}
    losses, rows = {}, []
    for impl in impls:
        config = configs.build(TrainConfig, run_config(impl, steps))
        with tempfile.TemporaryDirectory() as workdir:
            accuracy = loop.train(config, workdir)
            metrics = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
        losses[impl] = np.array([row["loss"] for row in metrics if "loss" in row])
        rows += [{"impl": impl, "step": i + 1, "loss": loss} | facts for i, loss in enumerate(losses[impl].tolist())]
        print(impl, accuracy)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for impl in set(impls) - {"xla"}:
        gap = np.abs(losses[impl] - losses["xla"])
        print(f"{impl:8} against xla: |difference of losses| {gap.mean():.5f} on average, {gap.max():.5f} at most")


def run_config(impl: str, steps: int) -> dict:
    """Return a gated convolution below Taylor attention with heads of 16 and 64, in bf16, on MQAR."""
    segment = {"seq_len": 128, "num_kv_pairs": 8}
    mixer = ("taylor", {"num_heads": 4, "feature_dim": 16, "impl": impl})
    return {
        "model": {"layers": (("conv", {}), mixer), "d_model": 256, "vocab_size": 512, "dtype": "bfloat16"},
        "data": {
            "kind": "mqar",
            "vocab_size": 512,
            "random_non_queries": False,
            "train": (segment | {"num_examples": 64 * steps},),
            "test": (segment | {"num_examples": 640},),
        },
        "optim": {"lr": 1e-3, "warmup_steps": steps // 10},
        "steps": steps,
        "batch_size": 64,
        "log_every": 1,
    }

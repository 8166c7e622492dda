"""Training with the kernels beside the XLA form, and pictures of `python -m based_jax bench kernels`.

python -m experiments.kernels train --out=experiments/kernels/results/training.jsonl
python -m experiments.kernels plot
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
IMPLS = "hopper", "xla", "oracle"
COLOURS = {
    "hopper": "tab:blue",
    "fla_parallel_based": "tab:red",
    "fla_fused_chunk_based": "tab:orange",
    "cudnn": "tab:green",
    "torch_sdpa": "tab:olive",
    "xla": "tab:gray",
}
NAMES = {
    "hopper": "Taylor, ours",
    "xla": "Taylor, ours through XLA",
    "fla_parallel_based": "Taylor, FLA parallel",
    "fla_fused_chunk_based": "Taylor, FLA fused chunk",
    "cudnn": "attention d=64, cuDNN",
    "torch_sdpa": "attention d=64, torch",
}


def main() -> None:
    """Train, or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="the same two-layer model with each implementation, on one GPU")
    training.add_argument("--out", type=Path, default=RESULTS / "training.jsonl", help="JSON lines; replaced")
    training.add_argument("--steps", type=int, default=400)
    training.add_argument("--impls", nargs="+", default=IMPLS)
    commands.add_parser("plot", help="draw results/*.jsonl")
    args = parser.parse_args()
    if args.command == "train":
        train(args.out, args.steps, args.impls)
    else:
        plot()


def train(out: Path, steps: int, impls) -> None:
    """Write the loss of every step of each run, and print how far the runs are from the XLA one."""
    import jax
    import numpy as np

    from based_jax import config as configs
    from based_jax.train import loop
    from based_jax.train.run import TrainConfig

    facts = {"device": jax.devices()[0].device_kind, "versions": {"jax": importlib.metadata.version("jax")}}
    facts["command"] = "python -m experiments.kernels " + " ".join(sys.argv[1:])
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


def plot() -> None:
    """Draw time against length and against batch, and the losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd

    rows = pd.concat([pd.read_json(path, lines=True) for path in sorted(RESULTS.glob("bench*.jsonl"))])
    rows = rows[rows["microseconds"].notna() & rows["op"].isin(["taylor_attention", "attention"])]
    keys = ["op", "impl", "pass", "batch", "heads", "seq_len"]
    rows = rows.drop_duplicates(keys, keep="last")
    length = rows[rows["batch"] * rows["seq_len"] == (1 << 14)]
    length = pd.concat([length, rows[(rows["batch"] == 1) & (rows["seq_len"] > (1 << 14))]])
    views = {
        "length": (length, "seq_len", "tokens T (16 heads; B T = 16,384 until B is 1)"),
        "batch": (rows[rows["seq_len"] == 2048], "batch", "batch B (16 heads, 2,048 tokens)"),
    }
    device = " and ".join(rows["device"].unique())
    for view, (table, x, label) in views.items():
        if table[x].nunique() < 2:
            continue
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
        for axis, which in zip(axes, ("forward", "forward+backward"), strict=True):
            part = table[table["pass"] == which].sort_values(x)
            for impl, line in part.groupby("impl", sort=False):
                axis.plot(line[x], line["microseconds"], "o-", ms=4, color=COLOURS[impl], label=NAMES[impl])
            ours = part[part["impl"] == "hopper"]
            axis.plot(ours[x], ours["floor_microseconds"], "k:", label="Taylor, floor")
            axis.set(xscale="log", yscale="log", xlabel=label, title=which)
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(f"microseconds, {device}")
        axes[0].legend(fontsize=8)
        figure.savefig(RESULTS / f"{view}.png", dpi=120)
    losses = pd.read_json(RESULTS / "training.jsonl", lines=True)
    figure, axis = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for impl, line in losses.groupby("impl", sort=False):
        axis.plot(line["step"], line["loss"], label=impl, alpha=0.7)
    axis.set(xlabel="step", ylabel="training loss", title="MQAR, two layers, bf16")
    axis.legend()
    figure.savefig(RESULTS / "training.png", dpi=120)


if __name__ == "__main__":
    main()

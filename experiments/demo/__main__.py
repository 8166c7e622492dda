"""The main job on a laptop: recall against bytes of state, then a language model on English.

python -m experiments.demo --workdir=demo_out
"""

import argparse
import dataclasses
import importlib.metadata
import os
import shutil
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from flax import nnx

from based_jax import config as configs
from based_jax.data.tokenizer import get_tokenizer
from based_jax.evals.evaluate import evaluate, model_sums
from based_jax.generate import Sampling, generate
from based_jax.nn.lm import LM
from based_jax.store import Store
from based_jax.sweep import Sweep
from based_jax.sweep.launch import run_sweep
from based_jax.sweep.schedule import SweepOptions
from based_jax.train.loop import train
from based_jax.train.run import TrainConfig, load_run

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = {"taylor": "Based (Taylor)", "window": "sliding window", "attention": "full attention", "conv": "convolution"}
COLOURS = {"taylor": "tab:blue", "window": "tab:orange", "attention": "tab:green", "conv": "tab:red"}
VARIANTS = ("conv_3", "conv_8", "window_8", "window_23", "taylor_4", "taylor_8", "attention_48", "attention_64")
PROMPT = "It was a "


def main() -> None:
    """Run both parts into a fresh workdir."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="folder for runs, table and picture; emptied first")
    workdir = parser.parse_args().workdir
    shutil.rmtree(workdir, ignore_errors=True)

    print("1. Recall (MQAR: 64 tokens, 8 key-value pairs, vocabulary 256; two layers)\n")
    frontier = recall_frontier(workdir / "recall")
    frontier.assign(**versions()).to_csv(workdir / "frontier.csv", index=False)
    draw(frontier, workdir / "frontier.png")
    print("\n" + frontier.to_string(index=False, formatters={"accuracy": "{:.3f}".format}))
    print(f"\nThe picture is {workdir / 'frontier.png'}.\n")

    print("2. A Based language model on English prose, byte by byte\n")
    language_model(workdir / "text")


def recall_frontier(store: Path) -> pd.DataFrame:
    """Train every variant of configs/mqar_tiny.py and return (mixer, size, state bytes per sequence, accuracy)."""
    sweep = recall_sweep()
    run_sweep(sweep, Store(store), "demo", SweepOptions(command="make demo"))
    found = {row["id"]: row for row in Store(store).rows()}
    rows = []
    for variant, (_, trial) in zip(VARIANTS, sweep.trials(), strict=True):
        mixer, size = variant.split("_")
        row = found[trial.id]
        rows.append((NAMES[mixer], int(size), row["state_bytes"], row["accuracy"]))
    return pd.DataFrame(rows, columns=["mixer", "size", "state bytes", "accuracy"])


def recall_sweep() -> Sweep:
    """Return one point for each variant, over what they have in common; a pass over the data is all its steps."""
    config = {variant: configs.load(f"{CONFIGS / 'mqar_tiny.py'}:{variant}").to_dict() for variant in VARIANTS}
    base = {key: config[VARIANTS[0]][key] for key in ("model", "data", "optim", "batch_size")}
    return Sweep(base, [{f"model.{key}": config[x]["model"][key] for key in ("layers", "d_model")} for x in VARIANTS])


def versions() -> dict[str, str]:
    """Return what a row of results has to name: the device, the versions and the command."""
    names = ("based-jax", "jax", "flax")
    return {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": " ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        "command": "make demo",
    }


def draw(frontier: pd.DataFrame, path: Path) -> None:
    """Save accuracy against state bytes, one line per mixer."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for key, name in NAMES.items():
        points = frontier[frontier["mixer"] == name].sort_values("state bytes")
        axes.plot(points["state bytes"], points["accuracy"], "o-", color=COLOURS[key], label=name)
    axes.set(xscale="log", xlabel="state per sequence (fp32)", ylabel="MQAR accuracy", ylim=(-0.03, 1.03))
    axes.set_xticks([2**n * 1024 for n in range(1, 6)], [f"{2**n} KiB" for n in range(1, 6)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="center left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def language_model(workdir: Path) -> None:
    """Train configs/text_tiny.py; print perplexity before and after; reload the checkpoint and continue a prompt."""
    config = configs.build(TrainConfig, configs.load(str(CONFIGS / "text_tiny.py")))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(workdir.parent / "cache")))
    before = validation_perplexity(config, LM(config.model, rngs=nnx.Rngs(config.seed)))
    train(config, workdir)

    _, step, model = load_run(workdir)
    after = validation_perplexity(config, model)
    print(
        f"\nValidation perplexity per byte: {before:.1f} before, {after:.2f} after {step} steps (checkpoint reloaded)."
    )
    tokenizer = get_tokenizer(config.data.tokenizer)
    sampling = Sampling(temperature=0.6, top_k=40)
    new = generate(model, [tokenizer.encode(PROMPT)], 300, sampling, stop=tokenizer.end_of_text, seed=1)
    print(f"\nThe model continues:\n\n{PROMPT}{tokenizer.decode(new[0])}")


def validation_perplexity(config: TrainConfig, model: LM) -> float:
    """Return the perplexity per token on the validation split."""
    source = config.data.open(config.batch_size, 0, 1)
    batches = ((name, batch) for name in source.eval_names for batch in source.eval_batches(name))
    return evaluate(model_sums(model), batches)["perplexity"]


if __name__ == "__main__":
    main()

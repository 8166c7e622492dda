"""The main job on a laptop: recall against bytes of state, then a language model on English.

python -m experiments.demo --workdir=demo_out
python -m experiments.demo --redraw=experiments/demo/results    # the picture alone, from the table that is there
"""

import argparse
import dataclasses
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import jax
import matplotlib
import pandas as pd
from flax import nnx

from based_jax import config as configs
from based_jax.data.tokenizer import get_tokenizer
from based_jax.evals.evaluate import evaluate, model_sums
from based_jax.generate import Sampling, generate
from based_jax.nn.lm import LM
from based_jax.pictures import paper, styles
from based_jax.pictures.configurations import accuracy
from based_jax.pictures.panels import accuracy_panels, byte_axis, panels_inches
from based_jax.revision import revision
from based_jax.store import Store
from based_jax.sweep import Sweep
from based_jax.sweep.launch import run_sweep
from based_jax.sweep.schedule import SweepOptions
from based_jax.train.loop import train
from based_jax.train.run import TrainConfig, load_run

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = {"taylor": "Based (Taylor)", "window": "sliding window", "attention": "full attention", "conv": "convolution"}
FAMILIES = {"taylor": "Based", "window": "Sliding window", "attention": "Attention", "conv": "Gated convolution"}
"""What pictures call them elsewhere, whose colours and markers they have here."""
PANEL_INCHES = 2.7
"""The width of the picture's panel, about."""
VARIANTS = ("conv_3", "conv_8", "window_8", "window_23", "taylor_4", "taylor_8", "attention_48", "attention_64")
PROMPT = "It was a "


def main() -> None:
    """Run both parts into a fresh workdir, or draw the picture of a table again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--workdir", type=Path, help="folder for runs, table and picture; emptied first")
    ways.add_argument("--redraw", type=Path, help="folder of a table, frontier.csv, whose picture is to be drawn")
    args = parser.parse_args()
    if args.redraw:
        draw(pd.read_csv(args.redraw / "frontier.csv"), args.redraw / "frontier")
    else:
        demonstrate(args.workdir)


def demonstrate(workdir: Path) -> None:
    """Run both parts into a workdir, which is emptied."""
    shutil.rmtree(workdir, ignore_errors=True)

    print("1. Recall (MQAR: 64 tokens, 8 key-value pairs, vocabulary 256; two layers)\n")
    frontier = recall_frontier(workdir / "recall")
    frontier = frontier.assign(**versions())
    frontier.to_csv(workdir / "frontier.csv", index=False)
    [picture, *_] = draw(frontier, workdir / "frontier")
    shown = frontier[["mixer", "size", "state bytes", "accuracy"]]
    print("\n" + shown.to_string(index=False, formatters={"accuracy": "{:.3f}".format}))
    print(f"\nThe picture is {picture}.\n")

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
        rows.append((NAMES[mixer], int(size), row["state_bytes"], accuracy(row)))
    return pd.DataFrame(rows, columns=["mixer", "size", "state bytes", "accuracy"])


def recall_sweep() -> Sweep:
    """Return one point for each variant, over what they have in common; a pass over the data is all its steps."""
    config = {variant: configs.load(f"{CONFIGS / 'mqar_tiny.py'}:{variant}").to_dict() for variant in VARIANTS}
    base = {key: config[VARIANTS[0]][key] for key in ("model", "data", "optim", "batch_size")}
    return Sweep(base, [{f"model.{key}": config[x]["model"][key] for key in ("layers", "d_model")} for x in VARIANTS])


def versions() -> dict[str, str]:
    """Return what a row of results has to name: the device, the versions, the revision and the command."""
    names = ("based-jax", "jax", "flax")
    return {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": " ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        "revision": revision() or "",
        "command": "make demo",
    }


@matplotlib.rc_context(styles.PAPER)
def draw(frontier: pd.DataFrame, path: Path) -> list[Path]:
    """Save accuracy against state bytes, one line per mixer, as PNG, SVG and PDF; return the files."""
    accuracies = frontier["accuracy"].tolist()
    told = [f"MQAR, 64 tokens, 8 pairs; {' and '.join(frontier['device'].unique())}"]
    figure = paper.sheet(styles.COLUMN_INCHES, panels_inches(accuracies), NAMES.values(), told)
    [panel] = accuracy_panels(figure, 1, accuracies, diverged=frontier["accuracy"].isna().any())
    for kind, name in NAMES.items():
        style = styles.FAMILY_STYLES[FAMILIES[kind]]
        points = frontier[frontier["mixer"] == name].sort_values("state bytes")
        form = styles.marked(style.colour, style.marker)
        panel.line(points["state bytes"], points["accuracy"], **form, label=name)
        panel.diverged(points["state bytes"][points["accuracy"].isna()].tolist(), style.colour)
    byte_axis(panel.axes, frontier["state bytes"], PANEL_INCHES)
    panel.axes.set_xlabel("state of one sequence, fp32")
    paper.add_legend(figure, panel.axes)
    return paper.save(figure, path)


def language_model(workdir: Path) -> None:
    """Train configs/text_tiny.py; print perplexity before and after; reload the checkpoint and continue a prompt."""
    config = configs.build(TrainConfig, configs.load(str(CONFIGS / "text_tiny.py")))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(workdir.parent / "cache")))
    before = validation_perplexity(config, LM(config.model, rngs=nnx.Rngs(config.seed)))
    if not train(config, workdir):
        sys.exit("The run was stopped; the same command goes on with it.")

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
    source = config.data.open(config.batch_size)
    batches = ((name, batch) for name in source.eval_names for batch in source.eval_batches(name))
    return evaluate(model_sums(model), batches)["perplexity"]


if __name__ == "__main__":
    main()

"""A context that is read in pieces at the same time against one reading: what the sum of their states is off by.

python -m experiments.state_addition --workdir=state_addition_out --out=experiments/state_addition/results/rows.jsonl
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from based_jax import config as configs
from based_jax.bench import rows
from based_jax.generate import Decoder, State, state_after
from based_jax.generate.addition import ADDABLE, prefill_in_pieces
from based_jax.generate.state_layout import StateLayout
from based_jax.labels import NO_LABEL
from based_jax.train.loop import train
from based_jax.train.run import TrainConfig, load_run

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = 64
PIECES, OVERLAPS = (2, 4, 8), (0, 2, 8)


class Trained(NamedTuple):
    """A model that is trained here.

    Attributes:
      config: that it is trained by, with its pattern of layers twice: a linear layer reads what another one wrote.
      changes: of the config.
      context: tokens of an example that are read in pieces; the rest is read behind them, and answered.
    """

    config: str
    changes: dict[str, dict | int]
    context: int


TASKS = {
    "recall": Trained("mqar_tiny.py:taylor_8", {}, 16),
    "text": Trained("text_tiny.py", {"data": {"seq_len": 256}, "batch_size": 8}, 192),
}


def main() -> None:
    """Train both models, unless the workdir has them, and measure each way of reading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, help="file of rows, JSON lines, to append to")
    args = parser.parse_args()
    with rows.appended(args.out) as write:
        for task, trained in TASKS.items():
            config = train_config(trained)
            if not train(config, args.workdir / task):
                sys.exit("The run was stopped; the same command goes on with it.")
            for row in measure(Decoder.of(load_run(args.workdir / task)[2]), *examples(config, trained.context)):
                print({"task": task, **row}, flush=True)
                write({"task": task, **row, **rows.facts()})


def train_config(trained: Trained) -> TrainConfig:
    """Return the config of a run."""
    values = configs.load(str(CONFIGS / trained.config))
    values.update(trained.changes)
    config = configs.build(TrainConfig, values)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, layers=2 * config.model.layers))


def examples(config: TrainConfig, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return contexts (N, T), what follows each (N, R) and its labels (N, R), of rows that are one document."""
    source = config.data.open(config.batch_size)
    batches = [batch for name in source.eval_names for batch in source.eval_batches(name)]
    inputs, labels = (np.concatenate([np.asarray(batch[key]) for batch in batches]) for key in ("inputs", "labels"))
    ids = [np.asarray(batch.get("segment_ids", np.ones_like(batch["inputs"]))) for batch in batches]
    whole = (np.concatenate(ids) == 1).all(axis=1)
    inputs, labels = inputs[whole][:EXAMPLES], labels[whole][:EXAMPLES]
    return inputs[:, :context], inputs[:, context:], labels[:, context:]


def measure(decoder: Decoder, contexts: np.ndarray, rest: np.ndarray, labels: np.ndarray) -> Iterator[dict]:
    """Yield a row for each way of reading: loss and accuracy on what follows, and how far each linear layer is off."""
    one_reading = [state_after(decoder, ids) for ids in contexts]
    yield {"reading": "one", **answers(decoder, one_reading, rest, labels)}
    for pieces in PIECES:
        for overlap in OVERLAPS:
            states = [prefill_in_pieces(decoder, ids, pieces, overlap=overlap) for ids in contexts]
            off = {"off": distances(decoder, states, one_reading)}
            yield {
                "reading": "pieces",
                "pieces": pieces,
                "overlap": overlap,
                **answers(decoder, states, rest, labels),
                **off,
            }
        last = [state_after(decoder, np.array_split(ids, pieces)[-1]) for ids in contexts]
        yield {"reading": "last piece alone", "pieces": pieces, **answers(decoder, last, rest, labels)}


def answers(decoder: Decoder, states: list[State], rest: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean loss in nats and the accuracy of what is labelled in the tokens that go on from each state."""
    layout = StateLayout(decoder)

    @jax.jit
    def log_probs(params, ids, caches):
        model = decoder.layout.model(params)
        return jax.nn.log_softmax(model.logits(model.prefill(ids, caches)[0])[..., : decoder.config.vocab_size])

    caches = jax.tree.map(lambda *x: jnp.concatenate(x), *(layout.fork(state, 1) for state in states))
    found = np.asarray(log_probs(decoder.params, rest, caches))
    asked = labels != NO_LABEL
    losses = -np.take_along_axis(found, np.where(asked, labels, 0)[..., None], axis=-1)[..., 0]
    return {"loss": float(losses[asked].mean()), "accuracy": float((found.argmax(-1) == labels)[asked].mean())}


def distances(decoder: Decoder, states: list[State], others: list[State]) -> dict[str, float]:
    """Return how far the sums of each linear layer are from others', relative to their norm, on average."""
    layers = [i for i, (kind, _) in enumerate(decoder.config.layers) if kind in ADDABLE]
    return {
        f"layers[{i}]": float(np.mean([_distance(*pair, i) for pair in zip(states, others, strict=True)]))
        for i in layers
    }


def _distance(state: State, other: State, layer: int) -> float:
    ours, theirs = (np.asarray(max(x.layer(layer).values(), key=np.size), np.float64) for x in (state, other))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


if __name__ == "__main__":
    main()

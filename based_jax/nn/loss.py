"""The loss, between model and step: sums over labelled positions, which training, evaluation and sweeps share.

Sums, not means, so that parts of a batch add up: who holds all parts divides, once, by their "count".
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from based_jax.dims import DropoutKey
from based_jax.labels import is_labelled
from based_jax.nn.lm import LM

Batch = Mapping[str, Array]
Sums = dict[str, Float[Array, ""]]


def loss_sums(model: LM, batch: Batch, dropout_key: DropoutKey | None = None) -> Sums:
    """Return the `position_sums` of a batch.

    Args:
      model: the language model.
      batch: inputs and labels (B, T), a label negative where there is none; optionally segment_ids (B, T).
      dropout_key: of training; without it nothing is dropped.
    """
    labels = batch["labels"]
    hidden = model.hidden(batch["inputs"], batch.get("segment_ids"), dropout_key=dropout_key)
    return position_sums(*model.cross_entropy(hidden, labels), labels)


def position_sums(losses: Float[Array, "*B"], correct: Bool[Array, "*B"], labels: Int[Array, "*B"]) -> Sums:
    """Return sums over the labelled positions: "loss" in nats, "correct" predictions, and "count", the positions.

    Args:
      losses, correct: of `LM.cross_entropy`, 0 and False where the label is negative.
      labels: what they were taken for.
    """
    return {
        "loss": jnp.sum(losses),
        "correct": jnp.sum(correct, dtype=jnp.float32),
        "count": jnp.sum(is_labelled(labels), dtype=jnp.float32),
    }

"""The training step: one pure function of (state, batch) on the split NNX state."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from based_jax.nn.lm import LM

IGNORED = -100

Batch = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: fp32 master parameters, optimizer state and the number of steps taken."""

    params: nnx.State
    opt_state: Any
    step: Int[Array, ""]


def init_state(model: LM, tx: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step."""
    params = nnx.state(model, nnx.Param)
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))


def loss_sums(model: LM, batch: Batch) -> dict[str, Float[Array, ""]]:
    """Return sums over the labelled positions of a batch: cross-entropy in nats, correct predictions, positions.

    Args:
      model: the language model.
      batch: inputs and labels (B, T), label `IGNORED` where there is none; optionally segment_ids (B, T).
    """
    labels = batch["labels"]
    losses, correct = model.cross_entropy(model.hidden(batch["inputs"], batch.get("segment_ids")), labels)
    return {
        "loss": jnp.sum(losses),
        "correct": jnp.sum(correct, dtype=jnp.float32),
        "count": jnp.sum(labels != IGNORED, dtype=jnp.float32),
    }


def make_train_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, microbatches: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return `step(state, batch) -> (state, metrics)`.

    The loss is the mean over all labelled positions of the batch, whatever the number of microbatches: each adds its
    sum and the gradient of its sum, and one division ends the scan.

    Args:
      graphdef: the model's structure, from `nnx.split`.
      tx: the optimizer.
      microbatches: parts that the batch is cut into along its first axis, which they divide.
    """

    def sums_and_grads(params: nnx.State, batch: Batch):
        def loss(params):
            sums = loss_sums(nnx.merge(graphdef, params), batch)
            return sums["loss"], sums

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return sums, grads

    def accumulate(params: nnx.State, batch: Batch):
        if microbatches == 1:
            return sums_and_grads(params, batch)
        parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), dict(batch))
        shapes = jax.eval_shape(sums_and_grads, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(total, part):
            return jax.tree.map(jnp.add, total, sums_and_grads(params, part)), None

        return jax.lax.scan(add, zeros, parts)[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        sums, grads = accumulate(state.params, batch)
        count = jnp.maximum(sums["count"], 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": sums["loss"] / count,
            "accuracy": sums["correct"] / count,
            "grad_norm": optax.tree.norm(grads),
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    return step

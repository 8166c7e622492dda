"""The training step: one pure function of (state, batch) on the split NNX state, for runs, lanes and benchmarks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from based_jax import parallel
from based_jax.nn.lm import LM
from based_jax.nn.loss import loss_sums

Metrics = dict[str, Float[Array, ""]]
Step = Callable[["TrainState", Any], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: fp32 master parameters, optimizer state and the number of steps taken."""

    params: nnx.State
    opt_state: Any
    step: Int[Array, ""]


def initial_state(model: LM, tx: optax.GradientTransformation) -> TrainState:
    """Return the state of a model before the first step."""
    params = nnx.state(model, nnx.Param)
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    microbatches: int = 1,
    sums_of: Callable[[LM, Any], dict[str, Float[Array, ""]]] = loss_sums,
) -> Step:
    """Return `step(state, batch) -> (state, metrics)`, metrics "loss", "accuracy" and "grad_norm".

    The loss is the mean over all labelled positions of the batch, whatever the number of microbatches.

    Args:
      graphdef: the model's structure, from `nnx.split`.
      tx: the optimizer; its values may be traced, as those of a sweep's lanes are.
      microbatches: parts that the batch is cut into along its first axis, which they divide: of `microbatches` rows
        that follow each other each goes into another one.
      sums_of: sums over the labelled positions of a batch, whatever a batch is; "loss", "correct" and "count" are used.
    """

    def sums_and_grads(params: nnx.State, batch: Any):
        def loss(params):
            sums = sums_of(nnx.merge(graphdef, params), batch)
            return sums["loss"], sums

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return sums, grads

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        sums, grads = _added(functools.partial(sums_and_grads, state.params), batch, microbatches)
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


def _added(call: Callable[[Any], Any], batch: Any, microbatches: int) -> Any:
    """Return what a call returns for a batch whose sums it takes: those of its microbatches, added up in a scan.

    Under a mesh (`jax.set_mesh`) each device has the same share of every microbatch.
    """
    if microbatches == 1:
        return call(batch)
    parts = jax.tree.map(lambda x: _cut(x, microbatches), batch)
    shapes = jax.eval_shape(call, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, call(part)), None), zeros, parts)[0]


def _cut(x: Array, microbatches: int) -> Array:
    """Return (B, ...) as (microbatches, B / microbatches, ...), the rows of each microbatch over all devices.

    A device holds rows that follow each other: those of one microbatch must come from every device, or the scan over
    microbatches would have one device's rows at a time, for all to compute.
    """
    return parallel.constrain(x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), None, "batch")

"""The training step: one pure function of (state, batch) on the split NNX state, for runs, lanes and benchmarks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from based_jax import optim, parallel
from based_jax.dims import DropoutKey
from based_jax.nn.lm import LM
from based_jax.nn.loss import loss_sums

Metrics = dict[str, Float[Array, ""]]
Step = Callable[["TrainState", Any], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: fp32 master parameters, optimizer state and the number of steps taken.

    `dropout_key` never changes, and without dropout it is not there: the data of a key into which each step folds its
    number.
    """

    params: nnx.State
    opt_state: Any
    step: Int[Array, ""]
    dropout_key: UInt32[Array, "_"] | None = None


def initial_state(model: LM, tx: optax.GradientTransformation, key: DropoutKey | None = None) -> TrainState:
    """Return the state of a model before the first step; `key` is needed, and used, by one with dropout alone."""
    params = nnx.state(model, nnx.Param)
    dropout_key = None
    if model.config.embed_dropout:
        assert key is not None, "a model with dropout needs a key to train"
        dropout_key = jax.random.key_data(key)
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32), dropout_key)


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    microbatches: int = 1,
    sums_of: Callable[..., dict[str, Float[Array, ""]]] = loss_sums,
) -> Step:
    """Return `step(state, batch) -> (state, metrics)`, metrics "loss", "accuracy" and "grad_norm".

    The loss is the mean over all labelled positions of the batch, whatever the number of microbatches.

    Args:
      graphdef: the model's structure, from `nnx.split`.
      tx: the optimizer; its values may be traced, as those of a sweep's lanes are.
      microbatches: parts that the batch is cut into along its first axis, which they divide: of `microbatches` rows
        that follow each other each goes into another one.
      sums_of: sums over the labelled positions of a batch, `(model, batch)`, whatever a batch is, and with dropout
        `(model, batch, key)`; "loss", "correct" and "count" are used.
    """

    def sums_and_grads(params: nnx.State, batch: Any, *keys: DropoutKey):
        def loss(params):
            sums = sums_of(nnx.merge(graphdef, params), batch, *keys)
            return sums["loss"], sums

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return sums, grads

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        call = functools.partial(sums_and_grads, state.params)
        sums, grads = _added(call, batch, microbatches, *_dropout_keys(state))
        count = jnp.maximum(sums["count"], 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": sums["loss"] / count,
            "accuracy": sums["correct"] / count,
            "grad_norm": optax.tree.norm(grads),
        }
        return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1), metrics

    return step


def skipping_nonfinite(step: Step) -> Step:
    """Return a step that leaves parameters and optimizer as they are where a metric is not finite, and counts on.

    Its metrics have "skipped_steps" too: those of all steps so far, by the updates that the optimizer has counted.
    """

    def guarded(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        new, metrics = step(state, batch)
        finite = jnp.all(jnp.isfinite(jnp.stack(list(metrics.values()))))
        unchanged = dataclasses.replace(state, step=new.step)
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, unchanged)
        skipped = kept.step - optim.updates_taken(kept.opt_state)
        return kept, metrics | {"skipped_steps": skipped.astype(jnp.float32)}

    return guarded


def _dropout_keys(state: TrainState) -> list[DropoutKey]:
    """Return the key of a step, or none."""
    if state.dropout_key is None:
        return []
    return [jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key), state.step)]


def _added(call: Callable[..., Any], batch: Any, microbatches: int, *keys: DropoutKey) -> Any:
    """Return what a call returns for a batch whose sums it takes: those of its microbatches, added up in a scan.

    Under a mesh (`jax.set_mesh`) each device has the same share of every microbatch. Each gets keys of its own.
    """
    if microbatches == 1:
        return call(batch, *keys)
    parts = jax.tree.map(lambda x: _cut(x, microbatches), batch), *(jax.random.split(k, microbatches) for k in keys)
    shapes = jax.eval_shape(call, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, call(*part)), None), zeros, parts)[0]


def _cut(x: Array, microbatches: int) -> Array:
    """Return (B, ...) as (microbatches, B / microbatches, ...), the rows of each microbatch over all devices.

    A device holds rows that follow each other: those of one microbatch must come from every device, or the scan over
    microbatches would have one device's rows at a time, for all to compute.
    """
    return parallel.constrain(x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), None, "batch", "time")

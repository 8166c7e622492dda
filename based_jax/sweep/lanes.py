"""Lanes: trials that differ in traced values alone, trained together by one compiled program.

What keeps a GPU busy with models this small: the examples lie on the device, about a hundred steps are one dispatch,
and logits exist only where the task asks for an answer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from based_jax.dims import DropoutKey
from based_jax.labels import NO_LABEL, is_labelled
from based_jax.nn.lm import LM
from based_jax.nn.loss import Sums, position_sums
from based_jax.optim import optimizer
from based_jax.sweep.trial import Trial
from based_jax.train.step import TrainState, initial_state, make_train_step

MAX_STEPS_PER_DISPATCH = 100
INIT_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
"""For a program that is called once: random numbers compile ten times as fast."""
COMPILER_OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
}
"""For all others: trying each product in many ways takes a hundred seconds of CPU to make a small model 5 % faster.

Products that share an operand stay apart (`projections.linear_part`).
"""


class Rates(NamedTuple):
    """The traced values of the optimizer, one per lane."""

    lr: Float[Array, "R"]
    weight_decay: Float[Array, "R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlacedExamples:
    """Examples on a device, with the positions that are asked: P of each, or all T.

    Attributes:
      inputs: ids.
      where: distinct positions, in order if they are all.
      answers: the label there, `NO_LABEL` where fewer than P positions are asked.
    """

    inputs: Int[Array, "N T"]
    where: Int[Array, "N P"]
    answers: Int[Array, "N P"]

    @classmethod
    def of(cls, inputs: np.ndarray, labels: np.ndarray, least: int = 1) -> "PlacedExamples":
        """Return the examples of (N, T) inputs and labels, `NO_LABEL` where nothing is asked, on the default device.

        P is the largest number of answers to an example, but at least `least`.
        """
        asked = is_labelled(labels)
        most = max(least, asked.sum(axis=1).max())
        if most == labels.shape[1]:
            where = np.broadcast_to(np.arange(most, dtype=np.int32), labels.shape)
        else:
            where = np.argsort(~asked, axis=1, kind="stable")[:, :most].astype(np.int32)
        return cls(*map(jnp.asarray, (inputs, where, np.take_along_axis(labels, where, axis=1))))

    @property
    def shape(self) -> tuple[int, int]:
        """T and P: with the number of rows, what a program is compiled for."""
        return self.inputs.shape[1], self.where.shape[1]

    def rows(self, rows: Int[Array, "B"]) -> "PlacedExamples":
        """Return some rows; for -1 one without answers."""
        taken = jax.tree.map(lambda x: x[jnp.maximum(rows, 0)], self)
        return dataclasses.replace(taken, answers=jnp.where(rows[:, None] < 0, NO_LABEL, taken.answers))


def answer_sums(model: LM, examples: PlacedExamples, dropout_key: DropoutKey | None = None) -> Sums:
    """Return `position_sums` of the answers; of examples with answers the "accuracies" and the number, "examples"."""
    answers = examples.answers
    where = None if answers.shape == examples.inputs.shape else examples.where
    hidden = model.hidden(examples.inputs, positions=where, dropout_key=dropout_key)
    losses, correct = model.cross_entropy(hidden, answers)
    counts = is_labelled(answers).sum(axis=1)
    return position_sums(losses, correct, answers) | {
        "accuracies": jnp.sum(correct.sum(axis=1) / jnp.maximum(counts, 1)),
        "examples": jnp.sum(counts > 0).astype(jnp.float32),
    }


class Program(NamedTuple):
    """A compiled call, and the bytes that it needs beside its arguments."""

    call: Callable[..., Any]
    bytes: int


class Lanes:
    """The programs of trials with one signature, for a number of lanes."""

    def __init__(self, trial: Trial, number: int):
        self.trial, self.number = trial, number
        self.graphdef, _ = nnx.split(nnx.eval_shape(lambda: LM(trial.model, rngs=nnx.Rngs(0))))
        self.seeds = jax.ShapeDtypeStruct((number,), jnp.uint32)
        self.states = jax.eval_shape(self._init, self.seeds)
        self.rates = jax.eval_shape(lambda: Rates(jnp.zeros(number), jnp.zeros(number)))

    def beginning(self) -> Program:
        """Return `call(seeds) -> states` before the first step, each a function of its seed (R,) alone."""
        return _compiled(self._init, (), self.seeds, options=INIT_COMPILER_OPTIONS)

    def training(self, examples: PlacedExamples) -> Program:
        """Return `call(states, rates, examples, rows, count) -> (states, losses)`.

        It takes `count` of the (`MAX_STEPS_PER_DISPATCH`, B) `rows`, -1 for none; `losses` (R,) are sums over steps of
        a batch's mean.
        """
        rows = jax.ShapeDtypeStruct((MAX_STEPS_PER_DISPATCH, self.trial.batch_size), jnp.int32)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        return _compiled(self._train, (0,), self.states, self.rates, _shapes(examples), rows, count)

    def testing(self, examples: PlacedExamples, rows: int) -> Program:
        """Return `call(params, examples) -> accuracies` (R,), means over examples; `rows` of them at a time."""

        def test(params, examples):
            return self._test(params, examples, rows)

        return _compiled(test, (), self.states.params, _shapes(examples))

    def _init(self, seeds) -> TrainState:
        tx = optimizer(self.trial.optim, self.trial.steps)

        def init(key):
            return initial_state(LM(self.trial.model, rngs=nnx.Rngs(key)), tx, key)

        return jax.vmap(lambda seed: init(jax.random.key(seed)))(seeds)

    def _train(self, states, rates, examples, rows, count):
        def step(i, carry):
            states, losses = carry
            states, loss = jax.vmap(self.step, (0, 0, None))(states, rates, examples.rows(rows[i]))
            return states, losses + loss

        return lax.fori_loop(0, count, step, (states, jnp.zeros(self.number, jnp.float32)))

    def step(self, state: TrainState, rates: Rates, batch: PlacedExamples) -> tuple[TrainState, Float[Array, ""]]:
        """Return the state of one lane after a batch, and the mean loss of its answers."""
        tx = optimizer(self.trial.optim, self.trial.steps, lr=rates.lr, weight_decay=rates.weight_decay)
        state, metrics = make_train_step(self.graphdef, tx, sums_of=answer_sums)(state, batch)
        return state, metrics["loss"]

    def _test(self, params, examples: PlacedExamples, rows: int):
        number = examples.inputs.shape[0]
        order = np.full(-(-number // rows) * rows, -1, np.int32)
        order[:number] = np.arange(number)

        def test(params, batch):
            sums = answer_sums(nnx.merge(self.graphdef, params), batch)
            return sums["accuracies"], sums["examples"]

        def add(totals, rows):
            found = jax.vmap(test, (0, None))(params, examples.rows(rows))
            return jax.tree.map(jnp.add, totals, found), None

        zeros = jnp.zeros(self.number, jnp.float32)
        (correct, count), _ = lax.scan(add, (zeros, zeros), order.reshape(-1, rows))
        return correct / jnp.maximum(count, 1)


def chosen(states, lanes: Sequence[int] | np.ndarray):
    """Return the states, or rates, of some lanes."""
    return jax.tree.map(lambda x: x[np.asarray(lanes)], states)


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _compiled(call: Callable, donated: tuple[int, ...], *shapes, options: dict[str, Any] = COMPILER_OPTIONS) -> Program:
    compiled = jax.jit(call, donate_argnums=donated).lower(*shapes).compile(options)
    memory = compiled.memory_analysis()
    return Program(compiled, memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0)

"""Sums over labelled positions: any negative label is none, for the loss, the count and what divides by it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from based_jax.labels import NO_LABEL, is_labelled
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.loss import loss_sums
from based_jax.train.step import initial_state, make_train_step

VOCAB = 32


@pytest.fixture(scope="module")
def model():
    config = LMConfig((("conv", {}),), 16, vocab_size=VOCAB, dtype="float32", init_std=0.3)
    return nnx.jit(lambda: LM(config, rngs=nnx.Rngs(0)))()


@pytest.fixture
def batch(rng):
    inputs, labels = rng.integers(VOCAB, size=(2, 4, 6), dtype=np.int32)
    return {"inputs": jnp.asarray(inputs), "labels": jnp.asarray(np.where(rng.random((4, 6)) < 0.5, labels, NO_LABEL))}


def test_sums_are_those_of_the_labelled_logits(model, batch):
    labels = np.asarray(batch["labels"])
    logits, asked = np.asarray(nnx.jit(model)(batch["inputs"])), is_labelled(labels)
    sums = nnx.jit(loss_sums)(model, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[asked], labels[asked])
    np.testing.assert_allclose(sums["loss"], losses.sum(), rtol=1e-5)
    assert sums["count"] == asked.sum() and 0 < asked.sum() < asked.size
    assert sums["correct"] == (logits[asked].argmax(-1) == labels[asked]).sum()


@pytest.mark.parametrize("none", [-1, -7])
def test_any_negative_label_is_none(model, batch, none, close):
    """To the loss and to the count alike: a step divides one by the other."""
    other = batch | {"labels": jnp.where(batch["labels"] == NO_LABEL, none, batch["labels"])}
    close(nnx.jit(loss_sums)(model, other), nnx.jit(loss_sums)(model, batch))
    tx = optax.sgd(1.0)
    step, state = jax.jit(make_train_step(nnx.graphdef(model), tx)), initial_state(model, tx)
    (after, metrics), (wanted, expected) = step(state, other), step(state, batch)
    close((after.params, metrics), (wanted.params, expected))

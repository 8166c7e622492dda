"""Inputs of the cross-entropy of a linear layer, and its call with gradients."""

import jax
import numpy as np

from based_jax.labels import NO_LABEL


def inputs_of(rng, normal):
    """Return a source of hidden states, a table, labels of which a third asks for nothing, and losses' gradients."""

    def draw(count=37, vocab=1000, dim=48, dtype="float32", scale=1.0):
        labels = np.where(rng.random(count) < 0.3, NO_LABEL, rng.integers(0, vocab, count))
        labels[:2] = NO_LABEL, vocab - 1
        return (
            normal(count, dim, dtype=dtype, scale=scale),
            normal(vocab, dim),
            labels.astype(np.int32),
            normal(count),
        )

    return draw


def run(call, hidden, table, labels, gradients):
    """Return losses, correct, and the gradients of hidden and table."""
    losses, pull, correct = jax.vjp(lambda h, w: call(h, w, labels), hidden, table, has_aux=True)
    return losses, correct, *pull(gradients)

"""Ids of packed documents (`based_jax/ops/segments.py`): what they mean, token by token in numpy, and rows of them."""

import numpy as np


def numbered(ids):
    """Return the number of each token's document in its row, from 1, and 0 at padding."""
    numbers = np.zeros_like(ids)
    for row, own in zip(np.asarray(ids), numbers, strict=True):
        number, before = 0, 0
        for t in np.flatnonzero(row):
            number, before = number + (row[t] != before), row[t]
            own[t] = number
    return numbers


def rows_over_pieces(rng, tokens):
    """Return ids (4, T): some that return; documents over several eighths; eighths of padding; one document."""
    mixed = rng.integers(0, 3, tokens)
    share = np.arange(tokens) / tokens
    long = np.array([1, 2, 0, 2])[np.searchsorted([0.16, 0.72, 0.91], share)]
    padded = np.array([0, 1, 0, 1])[np.searchsorted([0.28, 0.38, 0.75], share)]
    return np.stack([mixed, long, padded, np.ones(tokens)]).astype(np.int32)

"""What ids of packed documents mean (`based_jax/ops/segments.py`), token by token in numpy."""

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

"""Which rows of a batch one of several processes feeds."""

from collections.abc import Sequence

import numpy as np

from based_jax.data.checks import check_ints
from based_jax.errors import UserError

Rows = Sequence[int] | np.ndarray
"""Places of rows in a global batch, ascending."""


def own_rows(batch_size: int, rows: Rows | None) -> np.ndarray:
    """Return the places of the rows that a process feeds, all where `rows` is None.

    Raises:
      UserError: the batch has no rows, or `rows` are not ascending places in it.
    """
    check_ints(batch_size=batch_size)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it is at least 1.")
    own = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    bounded = np.concatenate([[-1], own, [batch_size]])
    if (np.diff(bounded) < 1).any():
        raise UserError(f"rows are {own.tolist()}; they are ascending places in a batch of {batch_size}.")
    return own

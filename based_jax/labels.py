"""What a label says: the token that is asked for, or, below 0, that none is. Data, losses and counts agree on it."""

from typing import Any

NO_LABEL = -100
"""What data and padding write where no token is asked for."""


def is_labelled(labels: Any) -> Any:
    """Return where an array of labels, numpy's or JAX's, asks for a token."""
    return labels >= 0

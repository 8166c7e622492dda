"""What a whole model is trained on in a benchmark, of this package or another."""

from typing import NamedTuple


class Size(NamedTuple):
    """Rows of a step, tokens of each, and how many steps are timed."""

    rows: int
    seq_len: int
    steps: int

"""What every source of data asks of its numbers."""

import operator
from collections.abc import Iterable
from typing import Any

from based_jax.errors import UserError, unknown

MAX_IDS = 2**31
"""Ids are int32."""
MAX_TOKENS_OF_EXAMPLES = 2**36


def check_ints(**values: Any) -> None:
    """Raise UserError for a value that is no integer; its name is that of the argument."""
    for name, value in values.items():
        try:
            operator.index(value)
        except TypeError:
            raise UserError(f"{name} is {value!r:.40}; it is an integer.") from None
        if isinstance(value, bool):
            raise UserError(f"{name} is {value}; it is an integer.")


def check_bools(**values: Any) -> None:
    """Raise UserError for a value that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise UserError(f"{name} is {value!r:.40}; it is True or False.")


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raise UserError for a value that is none of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        raise unknown(what, str(value), allowed)


def check_seed(seed: int, below: int = 2**32) -> None:
    """Raise UserError for a seed that is no integer of [0, below)."""
    check_ints(seed=seed)
    if not 0 <= seed < below:
        raise UserError(f"seed {seed} must be at least 0 and below 2**{below.bit_length() - 1}.")


def check_examples(num_examples: int, seq_len: int, vocab_size: int, seed: int) -> None:
    """Check what all functions that draw examples ask.

    Raises:
      UserError: no example or more than memory holds, ids that int32 does not hold, or a seed outside [0, 2**32).
    """
    check_ints(num_examples=num_examples, seq_len=seq_len, vocab_size=vocab_size)
    if num_examples < 1:
        raise UserError(f"num_examples {num_examples} must be at least 1.")
    if num_examples * seq_len > MAX_TOKENS_OF_EXAMPLES:
        raise UserError(f"num_examples {num_examples} of seq_len {seq_len} are over 2**36 tokens; make fewer.")
    if vocab_size > MAX_IDS:
        raise UserError(f"vocab_size {vocab_size} must be at most 2**31: ids are int32.")
    check_seed(seed)

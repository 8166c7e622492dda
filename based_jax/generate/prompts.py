"""What callers hand to `generate`, checked: prompts, and what the draws of each row depend on."""

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

import numpy as np
from jaxtyping import Int, UInt32

from based_jax.errors import UserError

Prompts = Iterable[Sequence[int] | Int[np.ndarray, "_"]]
"""Token ids, a sequence or an array for each prompt; an array (B, T) is B prompts of equal length."""

SEED_LIMIT, ROW_ID_LIMIT = 2**64, 2**32
MAX_TOKENS = 2**31 - 1
"""Tokens of a prompt with its continuation: places are int32."""


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or numpy; True is none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool | np.bool))


def is_number(value: Any) -> bool:
    """Return whether a value is a number of Python or numpy; True is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Return the beginning of what a value looks like, in one line."""
    return f"{' '.join(repr(value).split()):.40}"


def _is_ordered(values: Any) -> bool:
    """Return whether values stand in an order and count one by one, unlike those of bytes, sets, masked arrays."""
    kinds = str, bytes, bytearray, memoryview, Mapping, Set, np.ma.MaskedArray
    return not isinstance(values, kinds) and hasattr(values, "__len__") and hasattr(values, "__getitem__")


def checked_prompts(prompts: Prompts, vocab_size: int) -> list[Int[np.ndarray, "_"]]:
    """Return the ids of each prompt.

    Raises:
      UserError: there is no prompt, one is empty, or one is anything but ids that the model knows.
    """
    if isinstance(prompts, str | bytes):
        raise UserError(f"prompts is the string {shown(prompts)}; it is a list of prompts, each a list of token ids.")
    try:
        if isinstance(prompts, Mapping | Set | np.ma.MaskedArray):
            raise TypeError
        rows = list(np.asarray(prompts) if hasattr(prompts, "__array__") else prompts)
    except TypeError:
        raise UserError(f"prompts is {shown(prompts)}; it is a list of prompts, each a list of token ids.") from None
    if not rows:
        raise UserError("There is no prompt; give at least one.")
    return [checked_ids(f"Prompt {row}", prompt, vocab_size) for row, prompt in enumerate(rows)]


def checked_ids(name: str, prompt: Any, vocab_size: int) -> Int[np.ndarray, "_"]:
    """Return the ids of a prompt of that name; UserError if it is empty, or anything but ids that the model knows."""
    if isinstance(prompt, str | bytes):
        raise UserError(f"{name} is the string {shown(prompt)}; it is a list of token ids, as a tokenizer encodes it.")
    if not _is_ordered(prompt) or getattr(prompt, "ndim", 1) != 1:
        shape = f"an array of shape {prompt.shape}" if getattr(prompt, "ndim", 1) != 1 else shown(prompt)
        raise UserError(f"{name} is {shape}; it is a list of token ids.")
    if len(prompt) == 0:
        raise UserError(f"{name} is empty; it needs at least one token.")
    ids = np.asarray(prompt) if hasattr(prompt, "__array__") else prompt
    if not (isinstance(ids, np.ndarray) and np.issubdtype(ids.dtype, np.integer)):
        ids = _integers(name, ids.tolist() if isinstance(ids, np.ndarray) else list(ids))
    for token in ids[(ids < 0) | (ids >= vocab_size)][:1]:
        raise UserError(f"{name} has id {token}; the model knows ids 0 to {vocab_size - 1}.")
    return ids.astype(np.int32)


def _integers(name: str, ids: list) -> np.ndarray:
    """Return ids as an array, of any size."""
    for token in ids:
        if not is_integer(token):
            raise UserError(f"{name} has {shown(token)}; token ids are integers.")
    try:
        return np.asarray(ids, np.int64)
    except OverflowError:
        return np.asarray(ids, object)


def check_length(prompts: Sequence[np.ndarray], max_new_tokens: int, max_len: int | None) -> None:
    """Raise UserError for a number of new tokens that is none, or that the model does not read: `max_len` in all."""
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {shown(max_new_tokens)}; it is at least 1.")
    longest, most = max(map(len, prompts)), MAX_TOKENS if max_len is None else min(max_len, MAX_TOKENS)
    if longest >= most:
        raise UserError(f"A prompt has {longest} tokens; with one more it is at most the {most} that the model reads.")
    if max_new_tokens > most - longest:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}; the model reads {most} tokens, so that behind {longest} of a prompt"
            f" it is at most {most - longest}."
        )


def check_prefix(prompts: Sequence[np.ndarray], prefix_length: int, before: int = 0) -> None:
    """Raise UserError for a prompt whose last token, from which decoding goes on, is one that is read with others.

    Behind a state, which has read `before` tokens, it is none, if those that are read together are all among them.
    """
    if 0 < before < prefix_length:
        raise UserError(f"The state has read {before} tokens; the model reads the first {prefix_length} together.")
    shortest = min(map(len, prompts))
    if before == 0 and 0 < prefix_length >= shortest:
        raise UserError(
            f"A prompt has {shortest} tokens; the model reads the first {prefix_length} in no order, so that it has"
            f" at least {prefix_length + 1}."
        )


def checked_seeds(seed: int | Sequence[int], row_ids: Sequence[int] | None, num_rows: int) -> list[tuple[int, int]]:
    """Return the seed and the id of each row.

    Raises:
      UserError: there are not as many seeds or ids as rows, or one is out of range.
    """
    seeds: Any = [seed] * num_rows if is_integer(seed) else _per_row("seed", seed, num_rows)
    ids = range(num_rows) if row_ids is None else _per_row("row_ids", row_ids, num_rows)
    for name, values, limit in (("seed", seeds, SEED_LIMIT), ("row id", ids, ROW_ID_LIMIT)):
        for value in values:
            if not is_integer(value) or not 0 <= value < limit:
                raise UserError(f"A {name} is {shown(value)}; it is an integer from 0 to {limit - 1}.")
    return [(int(s), int(i)) for s, i in zip(seeds, ids, strict=True)]


def draw_words(seed: int, row_id: int) -> UInt32[np.ndarray, "3"]:
    """Return what a row's draws depend on beside their places: both halves of its seed, and its id."""
    return np.asarray((seed >> 32, seed & 0xFFFFFFFF, row_id), np.uint32)


def _per_row(name: str, values: Any, num_rows: int) -> list[int]:
    if not _is_ordered(values) or getattr(values, "ndim", 1) != 1:
        raise UserError(f"{name} is {shown(values)}; it is an integer for each row.")
    if len(values) != num_rows:
        raise UserError(f"{name} has {len(values)} values for {num_rows} prompts; it has one for each.")
    return np.asarray(values).tolist() if hasattr(values, "__array__") else list(values)

"""What is asked of a model: a prompt and how to go on from it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from based_jax.errors import UserError
from based_jax.generate.decoder import Decoder
from based_jax.generate.prompts import (
    check_length,
    check_prefix,
    checked_ids,
    checked_seeds,
    draw_words,
    is_integer,
    shown,
)
from based_jax.generate.sampling import GREEDY, MOST_TOP, Sampling
from based_jax.generate.state import State

MOST_STOP_IDS = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    A draw depends on the seed, on the row's id and on its place in the text: a request is answered the same alone as
    in any company.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: how many to add at most.
      sampling: see `Sampling`.
      stop_ids: each ends the continuation, and is not part of it; at most 16.
      stop_strings: likewise, found in the text by whoever has a tokenizer.
      seed: of the draws, from 0 to 2^64 - 1.
      row_id: of the draws, from 0 to 2^32 - 1.
      top_log_probs: how many of the likeliest tokens to tell with each that is drawn, at most 5.
      state: of what stands before the prompt, which goes on from it; a draw counts its tokens too.
    """

    prompt: Sequence[int] | np.ndarray
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    row_id: int = 0
    top_log_probs: int = 0
    state: State | None = None

    @property
    def length(self) -> int:
        """Tokens that stand before the first new one."""
        return len(self.prompt) + (0 if self.state is None else self.state.length)

    @property
    def draw_words(self) -> np.ndarray:
        """Both halves of the seed, and the row's id."""
        return draw_words(int(self.seed), int(self.row_id))

    def checked(self, decoder: Decoder, max_len: int | None, name: str = "Prompt") -> "Request":
        """Return the request with its prompt as an array.

        Raises:
          UserError: a value is not what this model with room for `max_len` tokens can be asked.
        """
        vocab_size = decoder.config.vocab_size
        ids = checked_ids(name, self.prompt, vocab_size)
        self._check_types()
        check_room([ids], self.max_new_tokens, max_len, self.state)
        check_prefix([ids], decoder.prefix_length, 0 if self.state is None else self.state.length)
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"sampling is {shown(self.sampling)}; it is a Sampling, as in Sampling(temperature=0.6).")
        stop_ids = tuple(checked_stop(stop, vocab_size) for stop in self.stop_ids)
        if len(stop_ids) > MOST_STOP_IDS:
            raise UserError(f"stop_ids has {len(stop_ids)} ids; it has at most {MOST_STOP_IDS}.")
        for stop in self.stop_strings:
            if not isinstance(stop, str) or not stop:
                raise UserError(f"A stop string is {shown(stop)}; it is a text of at least one character.")
        if not is_integer(self.top_log_probs) or not 0 <= self.top_log_probs <= MOST_TOP:
            raise UserError(f"top_log_probs is {shown(self.top_log_probs)}; it is 0 to {MOST_TOP}.")
        checked_seeds([self.seed], [self.row_id], 1)
        return dataclasses.replace(self, prompt=ids, max_new_tokens=int(self.max_new_tokens), stop_ids=stop_ids)

    def _check_types(self) -> None:
        if self.state is not None and not isinstance(self.state, State):
            raise UserError(f"state is {shown(self.state)}; it is a State, as state_after returns it.")
        for name, meaning in (("stop_ids", "token ids"), ("stop_strings", "texts")):
            if not isinstance(stops := getattr(self, name), Sequence) or isinstance(stops, str):
                raise UserError(f"{name} is {shown(stops)}; it is a tuple of {meaning}.")


def checked_request(request: Any) -> Request:
    """Return a request; UserError for what is none."""
    if not isinstance(request, Request):
        raise UserError(f"A request is {shown(request)}; it is a Request, as in Request([72, 105]).")
    return request


def check_room(prompts: Sequence[np.ndarray], max_new_tokens: int, max_len: int | None, state: State | None) -> None:
    """Raise UserError for a number of new tokens that is none, or for more than `max_len` in all, behind a state."""
    before = 0 if state is None else state.length
    if max_len is not None and before and before + 2 > max_len:
        raise UserError(f"The state has read {before} tokens; with a prompt and a new one it is at most {max_len}.")
    check_length(prompts, max_new_tokens, None if max_len is None else max_len - before)


def checked_stop(stop: Any, vocab_size: int) -> int:
    """Return an id that ends a continuation; UserError for what is none."""
    if not (is_integer(stop) and 0 <= stop < vocab_size):
        raise UserError(f"stop is {shown(stop)}; it is a token id, 0 to {vocab_size - 1}, or None.")
    return int(stop)

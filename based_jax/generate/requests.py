"""What is asked of a model: a prompt and how to go on from it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from based_jax.errors import UserError
from based_jax.generate.prompts import check_length, checked_ids, checked_seeds, draw_words, is_integer, shown
from based_jax.generate.sampling import GREEDY, Sampling
from based_jax.nn.lm_config import LMConfig

MOST_STOP_IDS = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    A draw depends on the seed, on the row's id and on its place in the text: a request is answered the same alone as
    in any company.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: how many to add at most.
      sampling: see `Sampling`.
      stop_ids: each ends the continuation, and is not part of it; at most 8.
      stop_strings: likewise, found in the text by whoever has a tokenizer.
      seed: of the draws, from 0 to 2^64 - 1.
      row_id: of the draws, from 0 to 2^32 - 1.
    """

    prompt: Sequence[int] | np.ndarray
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    row_id: int = 0

    @property
    def draw_words(self) -> np.ndarray:
        """Both halves of the seed, and the row's id."""
        return draw_words(int(self.seed), int(self.row_id))

    def checked(self, config: LMConfig, max_len: int | None, name: str = "Prompt") -> "Request":
        """Return the request with its prompt as an array.

        Raises:
          UserError: a value is not what a model of this config with room for `max_len` tokens can be asked.
        """
        ids = checked_ids(name, self.prompt, config.vocab_size)
        check_length([ids], self.max_new_tokens, max_len)
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"sampling is {shown(self.sampling)}; it is a Sampling, as in Sampling(temperature=0.6).")
        stop_ids = tuple(checked_stop(stop, config.vocab_size) for stop in self.stop_ids)
        if len(stop_ids) > MOST_STOP_IDS:
            raise UserError(f"stop_ids has {len(stop_ids)} ids; it has at most {MOST_STOP_IDS}.")
        for stop in self.stop_strings:
            if not isinstance(stop, str) or not stop:
                raise UserError(f"A stop string is {shown(stop)}; it is a text of at least one character.")
        checked_seeds([self.seed], [self.row_id], 1)
        return dataclasses.replace(self, prompt=ids, max_new_tokens=int(self.max_new_tokens), stop_ids=stop_ids)


def checked_stop(stop: Any, vocab_size: int) -> int:
    """Return an id that ends a continuation; UserError for what is none."""
    if not (is_integer(stop) and 0 <= stop < vocab_size):
        raise UserError(f"stop is {shown(stop)}; it is a token id, 0 to {vocab_size - 1}, or None.")
    return int(stop)

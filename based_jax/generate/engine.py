"""Generation: one prefill of the prompts, then a scan of decode steps, in one compiled program."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from based_jax.errors import UserError
from based_jax.generate.sampling import GREEDY, Sampling, sample
from based_jax.nn.lm import LM

PROMPT_BUCKET = 64


def generate(
    model: LM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    stop: int | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Continue each prompt by up to `max_new_tokens` token ids.

    Prompts of different lengths share a batch: shorter ones are padded on the left, which changes nothing (their
    padding enters no state).

    Args:
      model: the language model.
      prompts: token ids, at least one each.
      max_new_tokens: how many to add.
      sampling: see `Sampling`.
      stop: id that ends a continuation; it is not part of the result.
      seed: of the draws.

    Returns:
      The new ids of each prompt, without the prompt.

    Raises:
      UserError: no prompt or an empty one, an id that the model does not have, no tokens to add, or more than the model
        reads.
    """
    _check(prompts, max_new_tokens, model.config.vocab_size)
    _check_room(prompts, max_new_tokens, model.max_len)
    ids, segment_ids = _pad_left(prompts)
    graphdef, params = nnx.split(model)
    new = _generate(graphdef, sampling, max_new_tokens, params, ids, segment_ids, jax.random.key(seed))
    return [_until(row, stop) for row in np.asarray(new)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graphdef, sampling: Sampling, steps: int, params, ids, segment_ids, key) -> Int[Array, "B steps"]:
    model = nnx.merge(graphdef, params)
    room = ids.shape[1] + steps  # padding takes none
    cache = model.init_cache(ids.shape[0], room if model.max_len is None else min(room, model.max_len))
    hidden, cache = model.prefill(ids, cache, segment_ids)

    def draw(hidden, key):
        return sample(model.logits(hidden)[:, : model.config.vocab_size], sampling, key)

    def step(carry, key):
        tokens, cache = carry
        hidden, cache = model.step(tokens, cache)
        new = draw(hidden, key)
        return (new, cache), new

    first_key, *_ = keys = jax.random.split(key, steps)
    first = draw(hidden[:, -1], first_key)
    _, rest = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (B, T) and segment ids (1 for tokens, 0 for padding), T a multiple of `PROMPT_BUCKET`.

    Few distinct lengths mean few compilations.
    """
    longest = max(map(len, prompts))
    T = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    ids = np.zeros((len(prompts), T), np.int32)
    segment_ids = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) :] = prompt
        segment_ids[row, T - len(prompt) :] = 1
    return ids, segment_ids


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it is at least 1.")
    if not prompts:
        raise UserError("There is no prompt; give at least one.")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"Prompt {row} is empty; it needs at least one token.")
        unknown = [token for token in prompt if not 0 <= token < vocab_size]
        if unknown:
            raise UserError(f"Prompt {row} has id {unknown[0]}; the model knows ids 0 to {vocab_size - 1}.")


def _check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_len: int | None) -> None:
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    if max_len is not None and len(prompts[longest]) + max_new_tokens > max_len:
        raise UserError(
            f"Prompt {longest} has {len(prompts[longest])} tokens and max_new_tokens is {max_new_tokens}; the model"
            f" reads {max_len} in all."
        )


def _until(row: np.ndarray, stop: int | None) -> np.ndarray:
    ends = np.flatnonzero(row == stop) if stop is not None else row[:0]
    return row[: ends[0]] if ends.size else row

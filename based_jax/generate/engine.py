"""Generation: one prefill of the prompts, then a scan of decode steps, in one compiled program."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from based_jax.dims import BD, Tokens
from based_jax.errors import UserError
from based_jax.generate.prompts import Prompts, check_length, checked_prompts, draw_words, is_integer, shown
from based_jax.generate.sampling import GREEDY, Sampling, row_keys, sample
from based_jax.nn.lm import LM

PROMPT_BUCKET = 64


def generate(
    model: LM,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    stop: int | None = None,
    seed: int | Sequence[int] = 0,
    row_ids: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Continue each prompt by up to `max_new_tokens` token ids.

    Prompts of different lengths share a batch: shorter ones are padded on the left, which changes nothing (their
    padding enters no state). A draw depends on the seed, on the row's id and on its place in that row's own text: a
    prompt with its id goes on the same way alone as in any batch.

    Args:
      model: the language model.
      prompts: token ids, at least one each: lists or arrays, of different lengths or one array (B, T).
      max_new_tokens: how many to add.
      sampling: see `Sampling`.
      stop: id that ends a continuation; it is not part of the result.
      seed: of the draws, from 0 to 2^64 - 1; one for all rows, or one for each.
      row_ids: of the draws, one for each prompt, from 0 to 2^32 - 1; by default its index among the prompts.

    Returns:
      The new ids of each prompt, without the prompt.

    Raises:
      UserError: no prompt or an empty one, an id that the model does not have, no tokens to add, more than the
        model reads, or a value of another type or range.
    """
    if not isinstance(model, LM):
        raise UserError(f"model is {shown(model)}; it is an LM.")
    if not isinstance(sampling, Sampling):
        raise UserError(f"sampling is {shown(sampling)}; it is a Sampling, as in Sampling(temperature=0.6).")
    token_ids = checked_prompts(prompts, model.config.vocab_size)
    if stop is not None and not (is_integer(stop) and 0 <= stop < model.config.vocab_size):
        raise UserError(f"stop is {shown(stop)}; it is a token id, 0 to {model.config.vocab_size - 1}, or None.")
    check_length(token_ids, max_new_tokens, model.max_len)
    words = draw_words(seed, row_ids, len(token_ids))
    ids, segment_ids = _pad_left(token_ids)
    graphdef, params = nnx.split(model)
    new = _generate(graphdef, sampling, int(max_new_tokens), params, ids, segment_ids, words)
    return [_until(row, stop) for row in np.asarray(new)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graphdef, sampling: Sampling, steps: int, params, ids, segment_ids, words) -> Int[Array, "B steps"]:
    model = nnx.merge(graphdef, params)
    room = ids.shape[1] + steps  # padding takes none
    cache = model.init_cache(ids.shape[0], room if model.max_len is None else min(room, model.max_len))
    hidden, cache = model.prefill(ids, cache, segment_ids)
    keys, places = row_keys(words), jnp.sum(segment_ids, axis=1)

    def keys_of(i):
        return jax.vmap(jax.random.fold_in)(keys, places + i)

    def step(carry, i):
        tokens, cache = carry
        new, cache = decode_step(model, tokens, cache, sampling, keys_of(i))
        return (new, cache), new

    first = _draw(model, hidden[:, -1], sampling, keys_of(0))
    _, rest = jax.lax.scan(step, (first, cache), jnp.arange(1, steps))
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def decode_step(model: LM, tokens: Tokens, cache: tuple, sampling: Sampling, keys: Array) -> tuple[Tokens, tuple]:
    """Read one token of each row; return those drawn to follow it, each by its row's key, and the caches after it."""
    hidden, cache = model.step(tokens, cache)
    return _draw(model, hidden, sampling, keys), cache


def _draw(model: LM, hidden: BD, sampling: Sampling, keys: Array) -> Tokens:
    return sample(model.logits(hidden)[:, : model.config.vocab_size], sampling, keys)


def _pad_left(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
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


def _until(row: np.ndarray, stop: int | None) -> np.ndarray:
    ends = np.flatnonzero(row == stop) if stop is not None else row[:0]
    return row[: ends[0]] if ends.size else row

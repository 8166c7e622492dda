"""Generation: one prefill of the prompts, then a scan of decode steps, in one compiled program."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from based_jax.errors import UserError
from based_jax.nn.lm import LM

PROMPT_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 is greedy; `top_k` and `top_p` cut the distribution before the draw.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep that many of the most likely tokens; 0 keeps all.
      top_p: keep the fewest most likely tokens whose probabilities sum to at least this; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; it is 0 for greedy, or above.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it is 0 for all tokens, or the number kept.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is above 0 and at most 1.")


GREEDY = Sampling()


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
      UserError: no prompt or an empty one, an id that the model does not have, or no tokens to add.
    """
    _check(prompts, max_new_tokens, model.config.vocab_size)
    ids, segment_ids = _pad_left(prompts)
    graphdef, params = nnx.split(model)
    new = _generate(graphdef, sampling, max_new_tokens, params, ids, segment_ids, jax.random.key(seed))
    return [_until(row, stop) for row in np.asarray(new)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graphdef, sampling: Sampling, steps: int, params, ids, segment_ids, key) -> Int[Array, "B steps"]:
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(ids.shape[0], ids.shape[1] + steps)
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


def sample(logits: Float[Array, "B vocab"], sampling: Sampling, key: Array) -> Int[Array, "B"]:
    """Draw one token per row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        kept, _ = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
        logits = jnp.where(logits < kept[:, -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = jnp.where(logits < _nucleus_threshold(logits, sampling.top_p), -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)


def _nucleus_threshold(logits: Float[Array, "B vocab"], top_p: float) -> Float[Array, "B 1"]:
    """Return the smallest logit of the nucleus: the tokens before which less than `top_p` has been collected."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    p = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    return jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)


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


def _until(row: np.ndarray, stop: int | None) -> np.ndarray:
    ends = np.flatnonzero(row == stop) if stop is not None else row[:0]
    return row[: ends[0]] if ends.size else row

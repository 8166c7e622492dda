"""How the next token is drawn from logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from based_jax.errors import UserError
from based_jax.generate.prompts import is_integer, is_number, shown

COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures below and above which draws in fp32 are the most likely token, and any token alike."""


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
        if not is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {shown(self.temperature)}; it is 0 for greedy, or above.")
        if not is_integer(self.top_k) or self.top_k < 0:
            raise UserError(f"top_k is {shown(self.top_k)}; it is 0 for all tokens, or the number kept.")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {shown(self.top_p)}; it is above 0 and at most 1.")


GREEDY = Sampling()


def row_keys(words: UInt32[Array, "B 3"]) -> Array:
    """Return each row's key (B) from `prompts.draw_words`."""

    def row_key(seed_high, seed_low, row_id):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed_low), seed_high), row_id)

    return jax.vmap(row_key)(*words.T)


def sample(logits: Float[Array, "B vocab"], sampling: Sampling, keys: Array) -> Int[Array, "B"]:
    """Draw one token per row, each by its own key, so that no row's draws depend on the others."""
    if sampling.temperature < COLDEST:
        return jnp.argmax(logits, axis=-1)
    logits = logits / float(min(sampling.temperature, HOTTEST))
    if sampling.top_k:
        kept, _ = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
        logits = jnp.where(logits < kept[:, -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = jnp.where(logits < _nucleus_threshold(logits, float(sampling.top_p)), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits)


def _nucleus_threshold(logits: Float[Array, "B vocab"], top_p: float) -> Float[Array, "B 1"]:
    """Return the smallest logit of the nucleus: the tokens before which less than `top_p` has been collected.

    The first is one of them, even of a `top_p` that is 0 in fp32.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    p = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    kept = jnp.where(before < top_p, descending, jnp.inf)
    return jnp.minimum(jnp.min(kept, axis=-1, keepdims=True), descending[:, :1])

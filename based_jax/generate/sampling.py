"""How the next token is drawn from logits."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from based_jax.dims import BD
from based_jax.errors import UserError
from based_jax.generate.prompts import is_integer, is_number, shown
from based_jax.nn.lm import LM

COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures below and above which draws in fp32 are the most likely token, and any token alike."""

MOST_KEPT = 2**31 - 1
MOST_TOP = 5
"""Of the likeliest tokens that a row may ask for."""


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """How the next token of each row is drawn: its `Sampling` as arrays, the key of its seed and id, what is asked."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    keys: Array
    asks_top: Bool[Array, "B"]

    @classmethod
    def of(
        cls, samplings: Sequence[Sampling], words: Sequence[np.ndarray], ask_top: Sequence[bool] | None = None
    ) -> "Draws":
        """Return the draws of rows, `words` as `prompts.draw_words` has them, and which ask for likely tokens."""
        temperatures = [s.temperature and float(min(s.temperature, HOTTEST)) for s in samplings]
        temperature = np.asarray([0.0 if t < COLDEST else t for t in temperatures], np.float32)
        top_k = np.asarray([min(s.top_k, MOST_KEPT) for s in samplings], np.int32)
        top_p = np.asarray([float(s.top_p) for s in samplings], np.float32)
        asks_top = np.zeros(len(samplings), bool) if ask_top is None else np.asarray(ask_top)
        return _on_device(temperature, top_k, top_p, np.stack(words), asks_top)

    def of_live(self, live: Bool[Array, "B"]) -> "Draws":
        """Return draws of which those of other rows are greedy, which costs least."""
        return dataclasses.replace(
            self, temperature=jnp.where(live, self.temperature, 0.0), asks_top=live & self.asks_top
        )

    def without_likeliest(self) -> "Draws":
        """Return draws that ask for no likely tokens."""
        return dataclasses.replace(self, asks_top=jnp.zeros_like(self.asks_top))


class Drawn(NamedTuple):
    """A new token of each row.

    Attributes:
      token: the token.
      log_prob: of it, by the model's own distribution: at temperature 1, with nothing cut.
      top_tokens: the N likeliest tokens by the same, in order, `MOST_TOP` at most; 0 where no row asks for them.
      top_log_probs: of these.
    """

    token: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    top_tokens: Int[Array, "B N"]
    top_log_probs: Float[Array, "B N"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], vocab_size: int) -> "Drawn":
        """Return arrays of a shape, a last axis behind it for the likeliest tokens, without a token in them."""
        top = (*shape, min(MOST_TOP, vocab_size))
        return cls(*(jnp.zeros(x, dtype) for x in (shape, top) for dtype in (jnp.int32, jnp.float32)))


def drawable(model: LM, hidden: BD) -> Float[Array, "B vocab"]:
    """Return logits of which those of the padded vocabulary are never drawn."""
    logits = model.logits(hidden)
    return jnp.where(jnp.arange(logits.shape[-1]) < model.config.vocab_size, logits, -jnp.inf)


@jax.jit
def _on_device(temperature, top_k, top_p, words: UInt32[Array, "B 3"], asks_top) -> Draws:
    """Return the draws of numbers on the host, by one program: copies of each by itself would wait for each other."""
    return Draws(temperature, top_k, top_p, _row_keys(words), asks_top)


def _row_keys(words: UInt32[Array, "B 3"]) -> Array:
    """Return each row's key (B) from both halves of its seed and its id."""

    def row_key(seed_high, seed_low, row_id):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed_low), seed_high), row_id)

    return jax.vmap(row_key)(*words.T)


@jax.named_scope("draw")
def draw(logits: Float[Array, "B vocab"], draws: Draws, places: Int[Array, "B"]) -> Drawn:
    """Draw one token per row.

    A draw depends on the row's key and on the token's place in its text alone. What no row asks for is not computed.
    """
    likeliest, hot = jnp.argmax(logits, axis=-1).astype(jnp.int32), draws.temperature > 0
    total, (_, _, *nothing) = jax.nn.logsumexp(logits, axis=-1), Drawn.zeros(logits.shape[:1], logits.shape[1])

    def as_asked():
        token = jnp.where(hot, _drawn(logits, draws, places), likeliest)
        return token, jax.lax.cond(jnp.any(draws.asks_top), lambda: _likeliest(logits, total), lambda: nothing)

    asks = jnp.any(hot | draws.asks_top)
    token, top = jax.lax.cond(asks, as_asked, lambda: (likeliest, nothing))
    log_prob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - total
    return Drawn(token, log_prob, *top)


def _likeliest(logits: Float[Array, "B vocab"], total: Float[Array, "B"]):
    """Take the largest logit of what is left, and again: unlike a sort, each device of a mesh does so with its own."""

    def take(left, _):
        token = jnp.argmax(left, axis=1).astype(jnp.int32)
        others = jnp.arange(left.shape[1])[None] != token[:, None]
        return jnp.where(others, left, -jnp.inf), (token, jnp.max(left, axis=1) - total)

    _, likeliest = jax.lax.scan(take, logits, length=min(MOST_TOP, logits.shape[1]))
    return [x.T for x in likeliest]


def _drawn(logits: Float[Array, "B vocab"], draws: Draws, places: Int[Array, "B"]) -> Int[Array, "B"]:
    hot = draws.temperature > 0
    logits = logits / jnp.where(hot, draws.temperature, 1.0)[:, None]
    for asked, cut in ((draws.top_k > 0, _most_likely), (draws.top_p < 1, _nucleus)):
        logits = jax.lax.cond(jnp.any(hot & asked), cut, lambda logits, _: logits, logits, draws)
    keys = jax.vmap(jax.random.fold_in)(draws.keys, places)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _most_likely(logits: Float[Array, "B vocab"], draws: Draws) -> Float[Array, "B vocab"]:
    """Cut what is below each row's `top_k` largest logits."""
    vocab = logits.shape[-1]
    most = jnp.where(draws.top_k > 0, jnp.minimum(draws.top_k, vocab), vocab)
    return _cut(logits, lambda kept: jnp.sum(kept, axis=-1) >= most)


def _nucleus(logits: Float[Array, "B vocab"], draws: Draws) -> Float[Array, "B vocab"]:
    """Cut what is below the fewest largest logits that hold `top_p`."""
    p = jax.nn.softmax(logits, axis=-1)
    least = jnp.where(draws.top_p < 1, draws.top_p, jnp.inf)  # the sum of all may be above or below 1
    return _cut(logits, lambda kept: jnp.sum(jnp.where(kept, p, 0.0), axis=-1) >= least)


def _cut(logits: Float[Array, "B vocab"], is_enough: Callable) -> Float[Array, "B vocab"]:
    """Return logits with -inf in place of all below the largest threshold above which each row has enough.

    The threshold is found bit by bit among all numbers of fp32: 32 sums, where to sort a vocabulary takes much longer.
    The largest logit is kept in any case.
    """
    order = _order(logits)

    def narrow(i, threshold):
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(is_enough(order >= higher[:, None]), higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(logits.shape[:1], jnp.uint32))
    threshold = jnp.minimum(threshold, jnp.max(order, axis=-1))
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)


def _order(x: Float[Array, "B vocab"]) -> UInt32[Array, "B vocab"]:
    """Return unsigned integers in the order of fp32 numbers."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

"""Decays between the tokens of a chunk in TPU kernels: pairs of tokens weighed by what is left of one at the other.

A log-decay between two tokens is a sum of those of the tokens between, made by a table of 0 and 1 on matrix units: it
loses nothing to larger ones, as a difference of sums from the chunk's beginning would, and is never above 0.

One decay a head weighs pairs after their product. Decays of channels weigh queries and keys before it, such that both
meet halfway: level n has the pairs of a token in the second half of 2^(n+1) tokens with one in the first, through the
border between the halves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.tpu.products import columns, moved_back, moved_on, parts, product, table_product


def table(tokens: int, by_channel: bool) -> jax.Array:
    """Return which log-decays are summed, columns, for which sums, rows, as `of_heads` reads them: (n C, C) of bf16."""
    t, s = np.mgrid[:tokens, :tokens]
    since, after = s <= t, s > t
    halfway = [near(level, t, s) for level in range(tokens.bit_length() - 1)] * by_channel
    return jnp.asarray(np.concatenate([since, after, *halfway]), jnp.bfloat16)


def near(level: int, t, s):
    """Return whether token s decays what goes from token t to the border of its halves, or from there to it."""
    same, second = (t >> level) == (s >> level), (t >> level) & 1 == 1
    return same & np.where(second, s <= t, s > t)


def of_heads(table, log_decay: list, dtype) -> list["Decays"]:
    """Return the decays of heads, of (C, heads) log-decays in one matrix, or of each head's (C, K)."""
    tokens = table.shape[1]
    if len(table) > 2 * tokens:
        return [ByChannel.of(table, x, dtype) for x in log_decay]
    [together] = log_decay
    sums = columns(table_product(table, together, dtype))
    return [OneDecay.of(table, x, both, dtype) for x, both in zip(columns(together), sums, strict=True)]


class OneDecay(NamedTuple):
    """One decay for all channels.

    Attributes:
      since, after: from the chunk's beginning to each token, and from there to its end (C, 1).
      whole: from its beginning to its end (1, 1).
      between: from each token of a column to that of a row (C, C).
      dtype: of products.
    """

    since: jax.Array
    after: jax.Array
    whole: jax.Array
    between: jax.Array
    dtype: jnp.dtype

    @classmethod
    def of(cls, table, log_decay, sums, dtype) -> "OneDecay":
        """Return those of log-decays (C, 1) and the two sums that the table makes of them, one below the other."""
        tokens = len(log_decay)
        t, s = places(tokens)
        since, after = parts(sums, 2)
        between = table_product(table[:tokens], jnp.where(t > s, log_decay, 0.0), dtype)
        exp = jnp.exp
        return cls(exp(since), exp(after), exp(jnp.sum(log_decay, axis=0, keepdims=True)), exp(between), dtype)

    def pairs(self, x, y, *, own: bool = True):
        """Return the products of x and earlier tokens' y, each token's own too or not, 0 elsewhere (C, C)."""
        t, s = places(len(x))
        return jnp.where(t >= s if own else t > s, product(x, y, (1, 1), self.dtype) * self.between, 0.0)

    def seen(self, x):
        """Return x as it meets the state before the chunk."""
        return x * self.since

    def left(self, y):
        """Return what is left of y at the chunk's end."""
        return y * self.after

    def kept(self, like):
        """Return what is left of the state before it, one number for each of its keys."""
        return jnp.broadcast_to(self.whole, (1, like.shape[1]))


class ByChannel(NamedTuple):
    """A decay for each channel.

    Attributes:
      since, after, whole: as of `OneDecay`, (C, K) and (1, K).
      halfway: at each level from each token to the border that it meets others through, or from there to it (C, K).
      dtype: of products.
    """

    since: jax.Array
    after: jax.Array
    whole: jax.Array
    halfway: list[jax.Array]
    dtype: jnp.dtype

    @classmethod
    def of(cls, table, log_decay, dtype) -> "ByChannel":
        """Return those of log-decays (C, K)."""
        sums = table_product(table, log_decay, dtype)
        since, after, *halfway = map(jnp.exp, parts(sums, len(table) // table.shape[1]))
        return cls(since, after, jnp.exp(jnp.sum(log_decay, axis=0, keepdims=True)), halfway, dtype)

    def pairs(self, x, y, *, own: bool = True):
        """Return the products of x and earlier tokens' y, each token's own too or not, 0 elsewhere (C, C)."""
        t, s = places(len(x))
        found = jnp.where(t == s, jnp.sum(x * y, axis=1, keepdims=True), 0.0) if own else 0.0
        for level, weights in enumerate(self.halfway):
            met = (((t ^ s) >> level) == 1) & (t > s)
            found = found + jnp.where(met, product(x * weights, y * weights, (1, 1), self.dtype), 0.0)
        return found

    def pairs_before(self, x, y):
        """Return the products of x, as it meets the state before its token, and earlier tokens' y (C, C)."""
        return moved_on(self.pairs(moved_back(x), y), 0.0)

    def seen(self, x):
        """Return x as it meets the state before the chunk."""
        return x * self.since

    def seen_before(self, x):
        """Return x as it meets the state before the chunk, decayed as it is before x's token."""
        return x * moved_on(self.since, 1.0)

    def left(self, y):
        """Return what is left of y at the chunk's end."""
        return y * self.after

    def kept(self, _):
        """Return what is left of the state before it, one number for each of its keys."""
        return self.whole


Decays = OneDecay | ByChannel


def places(tokens: int):
    """Return the row and the column of each pair of a chunk's tokens."""
    return (lax.broadcasted_iota(jnp.int32, (tokens, tokens), axis) for axis in range(2))

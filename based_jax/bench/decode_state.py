"""The state that decoding keeps: filled without reading a text, its bytes, and those of them that a token moves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.nn.cache import TokenCache
from based_jax.ops.decode_calls import TaylorState


def random_state(shapes: Any, key: Array) -> Any:
    """Return caches of some shapes: small positive numbers, the same for all rows, and no token counted.

    What a step costs depends on none of them. Normalisers, which are sums, stay above 0.
    """
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [_random(x, k) for x, k in zip(leaves, keys, strict=True)])


def _random(x: jax.ShapeDtypeStruct, key: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    of_a_row = x.shape[-3:]
    return jnp.broadcast_to(jax.random.uniform(key, of_a_row, minval=0.01, maxval=0.1), x.shape).astype(x.dtype)


def at_length(caches: Any, length: Int[Array, ""]) -> Any:
    """Return caches that say of each row that it has had so many tokens."""

    def counted(x: Any) -> Any:
        return dataclasses.replace(x, length=jnp.full_like(x.length, length)) if isinstance(x, TokenCache) else x

    return jax.tree.map(counted, caches, is_leaf=_is_whole)


def array_bytes(shapes: Any) -> int:
    """Return the bytes of arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def moved_bytes(shapes: Any) -> float:
    """Return the bytes that a step moves at least, of full caches, the mean over many tokens.

    Tokens of the past are read and one is written; of sums that take W tokens at once all is read, a Wth part written,
    and half of the recent tokens are there; all else is read and written.
    """
    return sum(map(_moved, jax.tree.leaves(shapes, is_leaf=_is_whole)))


def _moved(x: Any) -> float:
    if isinstance(x, TokenCache):
        tokens = array_bytes(x.tokens)
        return tokens * (1 + 1 / x.slots) + 2 * (array_bytes(x) - tokens)
    if isinstance(x, TaylorState) and x.recent is not None:
        tokens, flush = array_bytes((x.recent.k, x.recent.v)), x.recent.k.shape[2]
        return array_bytes(x.sums) * (1 + 1 / flush) + tokens * (1 / 2 + 1 / flush)
    return 2.0 * array_bytes(x)


def _is_whole(x: Any) -> bool:
    return isinstance(x, TokenCache | TaylorState)

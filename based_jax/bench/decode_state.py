"""The state that decoding keeps: filled without reading a text, its bytes, and those of them that a token moves."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.nn.cache import TokenCache
from based_jax.ops.calls import TaylorState


def random_state(shapes: Any, key: Array) -> Any:
    """Return caches of some shapes: small positive numbers, the same for all rows, and no token counted.

    What a step costs depends on none of them. Normalisers, which are sums, stay above 0.
    """
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([_random(x, k) for x, k in zip(leaves, keys, strict=True)])


def _random(x: jax.ShapeDtypeStruct, key: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    of_a_row = x.shape[-3:]
    return jnp.broadcast_to(jax.random.uniform(key, of_a_row, minval=0.01, maxval=0.1), x.shape).astype(x.dtype)


def at_length(caches: Any, length: Int[Array, ""]) -> Any:
    """Return caches that say of each row that it has had so many tokens."""

    def counted(x: Any) -> Any:
        if not isinstance(x, TokenCache):
            return x
        return TokenCache(x.tokens, jnp.full_like(x.length, length))

    return jax.tree.map(counted, caches, is_leaf=_is_token_cache)


def array_bytes(shapes: Any) -> int:
    """Return the bytes of arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def moved_bytes(shapes: Any) -> float:
    """Return the bytes that a step moves at least, of full caches.

    Tokens of the past are read and one is written, a Taylor state is read and written as often as it says; all else is
    read and written.
    """
    return sum(_moved(x) for x in jax.tree.leaves(shapes, is_leaf=_is_read_more))


def _moved(x: Any) -> float:
    if isinstance(x, TokenCache):
        return array_bytes(x.tokens) * (1 + 1 / x.slots)
    flush = x.recent.k.shape[2] if isinstance(x, TaylorState) and x.recent is not None else 1
    return array_bytes(x) * (1 + 1 / flush)


def _is_token_cache(x: Any) -> bool:
    return isinstance(x, TokenCache)


def _is_read_more(x: Any) -> bool:
    """Return whether something is read more often than written."""
    return isinstance(x, TokenCache | TaylorState)

"""The state that decoding keeps: filled without reading a text, its bytes, and those of them that a token moves."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.nn.cache import TokenCache
from based_jax.ops.decode_calls import TaylorState

WEIGHT_SCALE = 0.02
"""Standard deviation of random weights: sums and gates of many stay small."""


def random_weights(shapes: Any, key: Array) -> Any:
    """Return arrays of some shapes, normal numbers. Those of one shape are drawn by one program, compiled once."""
    return _drawn(_random_weight, shapes, key)


def random_state(shapes: Any, key: Array) -> Any:
    """Return caches of some shapes: small positive numbers, the same for all rows, and no token counted.

    What a step costs depends on none of them. Normalisers, which are sums, stay above 0.
    """
    return _drawn(_random_sums, shapes, key)


def _drawn(draw: Callable, shapes: Any, key: Array) -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    arrays = [draw(x.shape, x.dtype, k) for x, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True)]
    return jax.tree.unflatten(structure, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_weight(shape: tuple[int, ...], dtype: Any, key: Array) -> Array:
    return WEIGHT_SCALE * jax.random.normal(key, shape, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_sums(shape: tuple[int, ...], dtype: Any, key: Array) -> Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return jnp.broadcast_to(jax.random.uniform(key, shape[-3:], minval=0.01, maxval=0.1), shape).astype(dtype)


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

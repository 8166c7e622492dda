"""Which keys tiles of queries of packed documents see, and the reverse, for kernels that pass over what is hidden.

`numbers` are those of documents (`ops/segments.py`), 0 for padding; `window` counts the keys that a query sees, its own
included.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def first_keys(numbers: Int[Array, "B T"], window: int, tile: int) -> Int[Array, "B _"]:
    """Return where the first key stands that queries of each tile see, T where they see none."""
    begin = jax.lax.cummax(jnp.where(_begins(numbers), _places(numbers), 0), axis=1)
    seen = jnp.where(numbers == 0, numbers.shape[1], jnp.maximum(begin, _places(numbers) - (window - 1)))
    return seen.reshape(numbers.shape[0], -1, tile).min(axis=2)


def last_queries(numbers: Int[Array, "B T"], window: int, tile: int) -> Int[Array, "B _"]:
    """Return where the last query may stand that sees keys of each tile, -1 where there is none."""
    size = numbers.shape[1]
    begin = jax.lax.cummin(jnp.where(_begins(numbers), _places(numbers), size), axis=1, reverse=True)
    end = jnp.pad(begin[:, 1:], ((0, 0), (0, 1)), constant_values=size) - 1
    seen = jnp.where(numbers == 0, -1, jnp.minimum(end, _places(numbers) + (window - 1)))
    return seen.reshape(numbers.shape[0], -1, tile).max(axis=2)


def keys_of_queries(numbers: Int[Array, "B T"], tile: int) -> Int[Array, "B _ 3"]:
    """Return from where to where each tile's queries see keys, and from where on they see all up to their own.

    A tile without a query gets its own keys.
    """
    time = numbers.shape[1]
    first, start = first_keys(numbers, time, tile), _places(numbers)[:, ::tile]
    hidden = jnp.where(numbers == 0, _places(numbers) + 1, first_keys(numbers, time, 1))
    all_from = jax.lax.cummax(hidden, axis=1)[:, tile - 1 :: tile]
    return jnp.stack(jnp.broadcast_arrays(jnp.minimum(first, start), start + tile, all_from), axis=2)


def queries_of_keys(numbers: Int[Array, "B T"], tile: int) -> Int[Array, "B _ 3"]:
    """Return from where to where queries see keys of each tile, and up to where they see all that are not after them.

    A tile without a key gets its first query.
    """
    start, tiles = _places(numbers)[:, ::tile], numbers.reshape(numbers.shape[0], -1, tile)
    end = jnp.maximum(last_queries(numbers, numbers.shape[1], tile), start) + 1
    one_document = (tiles == tiles[:, :, :1]).all(axis=2) & (tiles[:, :, 0] != 0)
    return jnp.stack(jnp.broadcast_arrays(start, end, jnp.where(one_document, end, 0)), axis=2)


def _places(numbers: Int[Array, "B T"]) -> Int[Array, "1 T"]:
    return jnp.arange(numbers.shape[1], dtype=jnp.int32)[None]


def _begins(numbers: Int[Array, "B T"]):
    """Return which tokens are their document's first."""
    return numbers > jnp.pad(jax.lax.cummax(numbers, axis=1)[:, :-1], ((0, 0), (1, 0)))

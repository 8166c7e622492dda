"""Which keys tiles of queries of packed documents see, and the reverse, for kernels that pass over what is hidden.

A `window` counts the keys that a query sees, its own included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Documents(NamedTuple):
    """Rows of documents, of whose tokens `numbers` (B, T) are the numbers (`ops/segments.py`), 0 for padding."""

    numbers: Int[Array, "B T"]

    def first_keys(self, window: int, tile: int) -> Int[Array, "B _"]:
        """Return where the first key stands that queries of each tile see, T where they see none."""
        begin = jax.lax.cummax(jnp.where(self._begins(), self._places(), 0), axis=1)
        seen = jnp.maximum(begin, self._places() - (window - 1))
        return self._tiles(jnp.where(self.numbers == 0, self._size, seen), tile).min(axis=2)

    def last_queries(self, window: int, tile: int) -> Int[Array, "B _"]:
        """Return where the last query may stand that sees keys of each tile, -1 where there is none."""
        size = self._size
        begin = jax.lax.cummin(jnp.where(self._begins(), self._places(), size), axis=1, reverse=True)
        end = jnp.pad(begin[:, 1:], ((0, 0), (0, 1)), constant_values=size) - 1
        seen = jnp.where(self.numbers == 0, -1, jnp.minimum(end, self._places() + (window - 1)))
        return self._tiles(seen, tile).max(axis=2)

    def keys(self) -> Int[Array, "B T"]:
        """Return where each key stands, -1 at padding."""
        return jnp.where(self.numbers == 0, -1, self._places())

    def keys_of_queries(self, tile: int) -> Int[Array, "B _ 3"]:
        """Return from where to where each tile's queries see keys, and from where on they see all up to their own.

        A tile without a query gets its own keys.
        """
        first, start = self.first_keys(self._size, tile), self._places()[:, ::tile]
        hidden = jnp.where(self.numbers == 0, self._places() + 1, self.first_keys(self._size, 1))
        all_from = jax.lax.cummax(hidden, axis=1)[:, tile - 1 :: tile]
        return jnp.stack(jnp.broadcast_arrays(jnp.minimum(first, start), start + tile, all_from), axis=2)

    def queries_of_keys(self, tile: int) -> Int[Array, "B _ 3"]:
        """Return from where to where queries see keys of each tile, and up to where they see all that are not after.

        A tile without a key gets its first query.
        """
        start, tiles = self._places()[:, ::tile], self._tiles(self.numbers, tile)
        end = jnp.maximum(self.last_queries(self._size, tile), start) + 1
        one_document = (tiles == tiles[:, :, :1]).all(axis=2) & (tiles[:, :, 0] != 0)
        return jnp.stack(jnp.broadcast_arrays(start, end, jnp.where(one_document, end, 0)), axis=2)

    @property
    def _size(self) -> int:
        return self.numbers.shape[1]

    def _tiles(self, x: Int[Array, "B T"], tile: int) -> Int[Array, "B _ _"]:
        return x.reshape(x.shape[0], -1, tile)

    def _places(self) -> Int[Array, "1 T"]:
        return jnp.arange(self._size, dtype=jnp.int32)[None]

    def _begins(self):
        """Return which tokens are their document's first."""
        return self.numbers > jnp.pad(jax.lax.cummax(self.numbers, axis=1)[:, :-1], ((0, 0), (1, 0)))


class OneDocument(NamedTuple):
    """Rows that are one document each, with padding behind it alone: what `Documents` says of them, without a scan.

    XLA makes scans of constants itself while it compiles, and compares every two tokens: of 32,768 for minutes.

    Attributes:
      batch: rows.
      time: tokens of each document.
      size: of a row, with its padding.
    """

    batch: int
    time: int
    size: int

    def first_keys(self, window: int, tile: int) -> Int[Array, "B _"]:
        """See `Documents`."""
        start = self._starts(tile)
        return jnp.where(start < self.time, jnp.maximum(start - (window - 1), 0), self.size)

    def last_queries(self, window: int, tile: int) -> Int[Array, "B _"]:
        """See `Documents`."""
        start = self._starts(tile)
        last = jnp.minimum(start + tile, self.time) - 1
        return jnp.where(start < self.time, jnp.minimum(last + (window - 1), self.size - 1), -1)

    def keys(self) -> Int[Array, "B T"]:
        """See `Documents`."""
        place = self._starts(1)
        return jnp.where(place < self.time, place, -1)

    def keys_of_queries(self, tile: int) -> Int[Array, "B _ 3"]:
        """See `Documents`."""
        start = self._starts(tile)
        begin, all_from = jnp.where(start < self.time, 0, start), jnp.where(start + tile > self.time, start + tile, 0)
        return jnp.stack([begin, start + tile, all_from], axis=2)

    def queries_of_keys(self, tile: int) -> Int[Array, "B _ 3"]:
        """See `Documents`."""
        start = self._starts(tile)
        end = jnp.where(start < self.time, self.size, start + 1)
        return jnp.stack([start, end, jnp.where(start + tile > self.time, 0, end)], axis=2)

    def _starts(self, tile: int) -> Int[Array, "B _"]:
        return jnp.broadcast_to(jnp.arange(0, self.size, tile, dtype=jnp.int32), (self.batch, self.size // tile))


def documents(numbers: Int[Array, "B T"], time: int | None) -> Documents | OneDocument:
    """Return the documents of numbers, or the only one of each row if it is known to have so many tokens."""
    return Documents(numbers) if time is None else OneDocument(numbers.shape[0], time, numbers.shape[1])

"""What decoding keeps: the cache of every mixer, and the tokens of the past in those whose state they are."""

import dataclasses
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from based_jax.dims import BS_mask, SegmentIds
from based_jax.errors import UserError
from based_jax.ops import segments


class Cache(NamedTuple):
    """A mixer's own state after the tokens so far, and the id of each row's document, 0 where none was given."""

    state: Any
    segment_id: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCache:
    """The newest tokens of each row's document, and how many it has had.

    Slot s holds the newest place p of the document with p % S == s, so one structure serves a cache of the whole
    document (S is the longest) and the ring of a window (S is the window). Rows have lengths of their own.

    Attributes:
      tokens: tree of (B, S, ...), what is kept of a token: a key and a value, or an input.
      length: tokens that the document has had.
    """

    tokens: Any
    length: Int[Array, "B"]

    @classmethod
    def empty(cls, tokens: Any) -> "TokenCache":
        """Return the cache before the first token, from `tokens` of zeros."""
        return cls(tokens, jnp.zeros(jax.tree.leaves(tokens)[0].shape[0], jnp.int32))

    @property
    def slots(self) -> int:
        """The number of tokens that fit."""
        return jax.tree.leaves(self.tokens)[0].shape[1]

    def append(self, token: Any) -> "TokenCache":
        """Write one token of each row, a tree of (B, ...), over its oldest slot."""
        time = jax.tree.map(lambda x: x[:, None], token)
        tokens = self._written(time, self._slot_of(self.length[:, None]))
        return dataclasses.replace(self, tokens=tokens, length=self.length + 1)

    def extend(self, tokens: Any, segment_ids: SegmentIds | None) -> "TokenCache":
        """Write the tokens of each row's last document, a tree of (B, T, ...), the newest where not all fit."""
        T = jax.tree.leaves(tokens)[0].shape[1]
        places, last, length = self.last_document(T, segment_ids)
        return self._with_kept(tokens, places, last, length)

    def extend_by_first(self, tokens: Any, counts: Int[Array, "B"]) -> "TokenCache":
        """Write the first tokens of each row, a tree of (B, T, ...), which go on with its document."""
        number = jnp.arange(jax.tree.leaves(tokens)[0].shape[1], dtype=jnp.int32)[None]
        return self._with_kept(
            tokens, self.length[:, None] + number, number < counts[:, None], self.length + counts.astype(jnp.int32)
        )

    def _with_kept(
        self, tokens: Any, places: Int[Array, "B T"], there: Bool[Array, "#B T"], length: Int[Array, "B"]
    ) -> "TokenCache":
        """Return the cache of documents of these lengths, with those of the tokens that are there and have a slot.

        Behind a barrier: what writes a token's many channels would find its slot anew for each.
        """
        kept = there & self._stays(places, length[:, None])
        beyond = self.slots + jnp.arange(places.shape[1], dtype=jnp.int32)[None]  # no slot, so that nothing is written
        slots = jax.lax.optimization_barrier(jnp.where(kept, self._slot_of(places), beyond))
        return dataclasses.replace(self, tokens=self._written(tokens, slots), length=length)

    def _slot_of(self, places: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Return where the tokens at places of their document go."""
        return places % self.slots

    def _stays(self, places: Int[Array, "B T"], length: Int[Array, "B 1"]) -> Bool[Array, "B T"]:
        """Return which tokens at places of a document of that length have a slot."""
        return places >= length - self.slots

    def last_document(
        self, count: int, segment_ids: SegmentIds | None
    ) -> tuple[Int[Array, "B T"], Bool[Array, "#B T"], Int[Array, "B"]]:
        """Return the place of each of the next tokens, which are of the last document, and how many that has then."""
        places, length = segments.positions(segment_ids, self.length, count)
        if segment_ids is None:
            return places, jnp.ones((1, count), bool), length
        numbers = segments.numbered(segment_ids)
        return places, (numbers == segments.last_id(numbers)[:, None]) & (numbers != 0), length

    def _written(self, tokens: Any, slots: Int[Array, "B T"]) -> Any:
        # Batched over rows, so that under a mesh each device writes its own.
        @jax.vmap
        def write(old: Shaped[Array, "S ..."], new: Shaped[Array, "T ..."], slots: Int[Array, "T"]):
            return old.at[slots].set(new.astype(old.dtype), mode="drop", unique_indices=True)

        return jax.tree.map(lambda old, new: write(old, new, slots), self.tokens, tokens)

    def visible(self) -> BS_mask:
        """Return which slots hold a token of the document."""
        return jnp.arange(self.slots)[None] < self.length[:, None]

    def in_order(self) -> tuple[Any, BS_mask]:
        """Return the tokens that are kept from oldest to newest, and which of them there are, the last ones."""
        place = (self.length - self.slots)[:, None] + jnp.arange(self.slots, dtype=jnp.int32)[None]
        order = self._order(place)

        def sort(x: Shaped[Array, "B S ..."]) -> Shaped[Array, "B S ..."]:
            return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

        return jax.tree.map(sort, self.tokens), place >= 0

    def _order(self, places: Int[Array, "B S"]) -> Int[Array, "B S"]:
        """Return the slots of the S newest places, whose oldest may stand before the first."""
        return places % self.slots

    def check_room(self, count: int, segment_ids: SegmentIds | None) -> None:
        """Raise UserError where so many tokens are more than the slots; with ids, some may be padding."""
        if segment_ids is None and count > self.slots:
            raise UserError(f"The cache has room for {self.slots} tokens, and {count} are to be read; make it longer.")

    def held(self, y: Shaped[Array, "B ..."], places: Int[Array, "B ..."], present: Bool[Array, "B ..."] | bool = True):
        """Return the outputs of tokens at `places` of their document, NaN where the cache has no slot for the token.

        How many tokens a row has had is known when the program runs, where nothing can be raised.
        """
        lost = present & (places >= self.slots)
        return jnp.where(lost.reshape(*lost.shape, *(1,) * (y.ndim - lost.ndim)), jnp.nan, y)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SinkCache(TokenCache):
    """The first tokens of each row's document, its sinks, and the newest ones.

    The sinks have slots of their own, which they keep; slot `sinks` + r of the ring behind them, of R slots, holds the
    newest place p with (p - sinks) % R == r. So the first slots are filled as those of any cache.
    """

    sinks: int = dataclasses.field(metadata={"static": True})

    @override
    def _slot_of(self, places: Int[Array, "B T"]) -> Int[Array, "B T"]:
        ring = self.slots - self.sinks
        return jnp.where(places < self.sinks, places, self.sinks + (places - self.sinks) % ring)

    @override
    def _stays(self, places: Int[Array, "B T"], length: Int[Array, "B 1"]) -> Bool[Array, "B T"]:
        return (places < self.sinks) | (places >= length - (self.slots - self.sinks))

    @override
    def _order(self, places: Int[Array, "B S"]) -> Int[Array, "B S"]:
        """Return the slots in which sinks come first, where more tokens were read than are kept."""
        number = jnp.arange(self.slots, dtype=jnp.int32)[None]
        first = (number < self.sinks) & (places[:, :1] >= 0)
        return jnp.where(first, number, self._slot_of(jnp.where(places < 0, places % self.slots, places)))


class TriedTokens(NamedTuple):
    """Tokens (B, T, ...) that were read on trial, a tree as of the cache's, and the cache before them."""

    tokens: Any
    cache: TokenCache

    def kept(self, counts: Int[Array, "B"]) -> TokenCache:
        """Return the cache with the first tokens of each row."""
        return self.cache.extend_by_first(self.tokens, counts)

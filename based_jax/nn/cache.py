"""Decode caches of attention: keys and values of the positions that a later token may see.

Slot s holds the newest position p with p % S == s, so one structure serves the full cache (S = the longest sequence)
and the ring of a window (S = the window). Keys are stored rotated; softmax does not care about their order.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.dims import BHK, BHV, BSHK, BSHV, BT, BTHK, BTHV, BS_mask
from based_jax.ops import segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys, values, the number of tokens read, and each row's first position of its current document."""

    k: BSHK
    v: BSHV
    length: Int[Array, ""]
    start: Int[Array, "B"]

    @classmethod
    def empty(cls, batch: int, slots: int, heads: int, head_dim: int, dtype) -> "KVCache":
        """Return the cache before the first token."""
        zeros = jnp.zeros((batch, slots, heads, head_dim), dtype)
        return cls(zeros, zeros, jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))

    @property
    def slots(self) -> int:
        """The number of positions that fit."""
        return self.k.shape[1]

    def append(self, k: BHK, v: BHV) -> "KVCache":
        """Write one token over the oldest slot."""
        at = (0, self.length % self.slots, 0, 0)
        k_BSHK = jax.lax.dynamic_update_slice(self.k, k[:, None].astype(self.k.dtype), at)
        v_BSHV = jax.lax.dynamic_update_slice(self.v, v[:, None].astype(self.v.dtype), at)
        return dataclasses.replace(self, k=k_BSHK, v=v_BSHV, length=self.length + 1)

    def visible(self) -> BS_mask:
        """Return which slots hold a position of the current document."""
        slot = jnp.arange(self.slots)
        newest = self.length - 1 - (self.length - 1 - slot) % self.slots
        return newest[None, :] >= self.start[:, None]

    def in_order(self) -> "KVCache":
        """Return the last S positions from oldest to newest; those before the first token are zeros."""
        order = (self.length + jnp.arange(self.slots)) % self.slots
        return dataclasses.replace(self, k=self.k[:, order], v=self.v[:, order])

    def extend(self, k: BTHK, v: BTHV, segment_ids: BT) -> "KVCache":
        """Write T tokens; those that no longer fit are dropped, oldest first."""
        past = self.in_order()
        length = self.length + k.shape[1]
        slot_of = (jnp.arange(self.slots) - length) % self.slots

        def write(old, new):
            newest = jnp.concatenate([old, new.astype(old.dtype)], axis=1)[:, -self.slots :]
            return newest[:, slot_of]

        return KVCache(write(past.k, k), write(past.v, v), length, self.start_after(segment_ids))

    def start_after(self, segment_ids: BT) -> Int[Array, "B"]:
        """Return where the document that the next token continues began; past the end where all is padding."""
        T = segment_ids.shape[1]
        begins = (segment_ids[:, 1:] != segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
        last_beginning = jnp.max(jnp.where(begins, jnp.arange(1, T)[None], 0), axis=1, initial=0)
        start = jnp.where(last_beginning > 0, self.length + last_beginning, self.start)
        return jnp.where(segments.last_id(segment_ids) == 0, self.length + T, start)

    def past_ids(self, segment_ids: BT) -> Int[Array, "B S"]:
        """Return for each of `in_order`'s slots the id of the document that `segment_ids` continue, 0 if not of it."""
        position = self.length - self.slots + jnp.arange(self.slots)
        seen = position[None, :] >= self.start[:, None]
        return jnp.where(seen, segments.first_id(segment_ids)[:, None], 0)

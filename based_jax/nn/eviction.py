"""Caches of attention with a budget of tokens: which ones stay, by policy.

A cache of S slots is filled in order. Then its newest tokens are in a ring, and the token that leaves the ring, the
oldest of these, is dropped or takes the place of a token that was kept before. With A = sum_t a_tj, what the queries
since token j have paid of attention to it, a_tj averaged over the queries that share a key:

    window      the S newest; positions are those in the text
    streaming   the first `sinks` tokens and the newest (arXiv 2309.17453); positions are those in the cache
    h2o         of each head half of S by the largest A, and the newest (arXiv 2306.14048); positions in the text
    roco        of each head those with the largest mean A / n over the n queries since, where of all but the newest ten
                the ones whose a_tj deviate most are not asked (arXiv 2402.06262); positions in the text

A token is dropped when the next one is written, so that a query sees S keys, its own included, as in a window.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from based_jax.dims import SegmentIds
from based_jax.nn.cache import TokenCache

ROCO_NEWEST = 10
"""Tokens that `roco` never drops (DRSY/EasyKV:easykv/easykv.py)."""
ROCO_EXEMPT = 0.3
"""Of the budget, by the deviation of what they were paid (ibid., `recent_ratio`)."""

Statistics = Mapping[str, Float[Array, "B S G"]]
Choice = Callable[[Statistics, int], Int[Array, "B G"]]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which tokens of a full cache stay.

    Attributes:
      kept: of (slots, sinks), how many slots are no ring.
      statistics: of each token and head that are remembered, those of `paid`.
      dropped: which of the kept tokens and, after them, the one that leaves the ring is dropped, from the statistics
        (B, kept + 1, G) and S; None where the latter always is.
      moves_sinks: whether kept keys are turned along with the query, to stand before the ring.
      least: tokens of a budget beside the sinks.
    """

    kept: Callable[[int, int], int]
    statistics: tuple[str, ...] = ()
    dropped: Choice | None = None
    moves_sinks: bool = False
    least: int = 1


def _least_paid(statistics: Statistics, _slots: int) -> Int[Array, "B G"]:
    return jnp.argmin(statistics["sum"], axis=1)


def _least_paid_of_steady(statistics: Statistics, slots: int) -> Int[Array, "B G"]:
    count = jnp.maximum(statistics["count"], 1)
    mean = statistics["sum"] / count
    variance = statistics["square"] / count - mean**2
    asked = min(slots - int(ROCO_EXEMPT * slots), variance.shape[1])
    return jnp.argmin(jnp.where(_least(variance, asked), mean, jnp.inf), axis=1)


def _least(x: Float[Array, "B N G"], count: int) -> Bool[Array, "B N G"]:
    """Return which are the least `count`, the first ones of those that are equal: up to the last one in order."""
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    value, last = (y[:, count - 1 : count] for y in jax.lax.sort((x, place), dimension=1, num_keys=1, is_stable=True))
    return (x < value) | ((x == value) & (place <= last))


POLICIES: dict[str, Policy | None] = {
    "full": None,
    "window": Policy(lambda slots, sinks: 0),
    "streaming": Policy(lambda slots, sinks: min(sinks, slots - 1), moves_sinks=True),
    "h2o": Policy(lambda slots, sinks: slots - slots // 2, ("sum",), _least_paid, least=2),
    "roco": Policy(
        lambda slots, sinks: slots - min(ROCO_NEWEST, slots // 2),
        ("sum", "square", "count"),
        _least_paid_of_steady,
        least=2,
    ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BudgetCache(TokenCache):
    """A cache of a policy.

    Attributes:
      statistics: of what each slot's token was paid, (B, S, G) fp32.
      sinks: the first keys before they are turned (B, sinks, G, K); None where they stay where they were.
    """

    statistics: dict[str, Float[Array, "B S G"]]
    sinks: Shaped[Array, "B _ G K"] | None

    @classmethod
    def around(cls, cache: TokenCache, policy: Policy, sinks: int) -> "BudgetCache":
        """Return a policy's cache before the first token, of a cache (B, S, G, K) of keys and values."""
        k, _ = cache.tokens
        statistics = {name: jnp.zeros(k.shape[:3], jnp.float32) for name in policy.statistics}
        first = k[:, :sinks] if policy.moves_sinks else None
        return cls(cache.tokens, cache.length, statistics, first)

    def slot(self, kept: int) -> Int[Array, "B"]:
        """Return where the next token goes: behind those before it, then into the ring."""
        return jnp.where(self.length < kept, self.length, kept + (self.length - kept) % (self.slots - kept))

    def with_kept(self, policy: Policy, kept: int, rows: Bool[Array, "B"]) -> "BudgetCache":
        """Return the cache in which the token that leaves the ring has taken the place of the one dropped for it.

        `rows` are those that a token will be written to. Where none leaves, or it is itself dropped, nothing changes.
        """
        if policy.dropped is None or kept == 0:
            return self
        leaving = jax.tree.map(lambda x: _at(x, self.slot(kept)), (self.tokens, self.statistics))
        asked = jax.tree.map(lambda x, y: jnp.concatenate([x[:, :kept], y[:, None]], 1), self.statistics, leaving[1])
        place = policy.dropped(asked, self.slots)
        moves = (place < kept) & (rows & (self.length >= self.slots))[:, None]
        slots = jnp.where(moves, place, self.slots)  # no slot, so that nothing is written
        tokens, statistics = jax.tree.map(lambda x, y: _put(x, y, slots), (self.tokens, self.statistics), leaving)
        return dataclasses.replace(self, tokens=tokens, statistics=statistics)

    def appended(self, token: Any, kept: int, rows: Bool[Array, "B"]) -> "BudgetCache":
        """Return the cache with a token (B, G, .) of some rows, which nothing has been paid yet."""
        nothing = jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), self.statistics)
        slot = jnp.where(rows, self.slot(kept), self.slots)[:, None]

        def write(old, new):
            return _put(old, new, jnp.broadcast_to(slot, new.shape[:2]))

        tokens, statistics = jax.tree.map(write, (self.tokens, self.statistics), (token, nothing))
        length = self.length + rows.astype(jnp.int32)
        return dataclasses.replace(self, tokens=tokens, statistics=statistics, length=length)

    def paid(self, weights: Float[Array, "B S G"], seen: Bool[Array, "B S"]) -> "BudgetCache":
        """Return the cache after a query that has paid these weights to the tokens that it has seen."""
        more = {"sum": weights, "square": weights**2, "count": jnp.broadcast_to(seen[..., None], weights.shape)}
        statistics = {name: x + more[name].astype(jnp.float32) for name, x in self.statistics.items()}
        return dataclasses.replace(self, statistics=statistics)

    def filled_up(self, tokens: Any, keys: Any, segment_ids: SegmentIds | None) -> "BudgetCache":
        """Return the cache with tokens (B, T, G, .) of each row's last document, all of which fit, nothing paid yet.

        `keys` are those of the tokens before they are turned.
        """
        places, last, length = self.last_document(keys.shape[1], segment_ids)
        before = jnp.where(places.min(axis=1, where=last, initial=self.slots) == 0, 0, self.length)
        old = (jnp.arange(self.slots)[None] < before[:, None])[..., None]
        statistics = jax.tree.map(lambda x: jnp.where(old, x, 0), self.statistics)
        cache = TokenCache(self.tokens, self.length).extend(tokens, segment_ids)
        return BudgetCache(
            cache.tokens, length, statistics, self._with_sinks(keys, jnp.where(last, places, self.slots))
        )

    def ring(self, kept: int) -> tuple[Any, Bool[Array, "B R"]]:
        """Return the R tokens of the ring from oldest to newest, and which of them there are."""
        R = self.slots - kept
        places = self.length[:, None] - R + jnp.arange(R)[None]
        slots = kept + (places - kept) % R
        tokens = jax.tree.map(lambda x: jnp.take_along_axis(x, slots[..., None, None], axis=1), self.tokens)
        return tokens, places >= kept

    def extended(self, tokens: Any, keys: Any, segment_ids: SegmentIds, kept: int, turn: Callable) -> "BudgetCache":
        """Return the cache of a policy without statistics after tokens (B, T, G, .) of each row's last document.

        `keys` are those of the tokens before they are turned, and `turn` is that of `with_sinks`.
        """
        T, R = keys.shape[1], self.slots - kept
        places, last, length = self.last_document(T, segment_ids)
        in_ring = jnp.where(places >= length[:, None] - R, kept + (places - kept) % R, self.slots + jnp.arange(T))
        slots = jnp.where(last, jnp.where(places < kept, places, in_ring), self.slots + jnp.arange(T))
        sinks = self._with_sinks(keys, jnp.where(last, places, self.slots))
        return dataclasses.replace(self, tokens=self._written(tokens, slots), length=length, sinks=sinks)._turned(turn)

    def with_sinks(self, key: Any, place: Int[Array, "B"], turn: Callable) -> "BudgetCache":
        """Return the cache after a token at a place, whose key is kept as it is, with the sinks before the ring.

        `turn(keys, places)` turns keys (B, n, G, K).
        """
        if self.sinks is None:
            return self
        return dataclasses.replace(self, sinks=self._with_sinks(key[:, None], place[:, None]))._turned(turn)

    def _turned(self, turn: Callable) -> "BudgetCache":
        """Return the cache with the sinks before the ring."""
        if self.sinks is None:
            return self
        left, (k, v) = jnp.maximum(self.length - self.slots, 0)[:, None], self.tokens
        turned = turn(self.sinks, left + jnp.arange(self.sinks.shape[1])[None]).astype(k.dtype)
        return dataclasses.replace(self, tokens=(k.at[:, : self.sinks.shape[1]].set(turned), v))

    def _with_sinks(self, keys: Any, places: Int[Array, "B T"]) -> Any:
        if self.sinks is None:
            return None
        write = jax.vmap(lambda old, new, slots: old.at[slots].set(new.astype(old.dtype), mode="drop"))
        return write(self.sinks, keys, places)


def _at(x: Shaped[Array, "B S G ..."], slot: Int[Array, "B"]) -> Shaped[Array, "B G ..."]:
    return jnp.take_along_axis(x, slot.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]


def _put(x: Shaped[Array, "B S G ..."], new: Shaped[Array, "B G ..."], slots: Int[Array, "B G"]):
    """Write each head's new element to a slot of its own, batched over rows and heads."""
    write = jax.vmap(lambda x, new, slot: x.at[slot].set(new.astype(x.dtype), mode="drop"), (1, 0, 0), 1)
    return jax.vmap(write)(x, new, slots)

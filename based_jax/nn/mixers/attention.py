"""Softmax attention with rotary positions: the mixer of Transformer++ (arXiv 2402.18668, section 5)."""

import dataclasses
import math
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp

from based_jax.config import added_later
from based_jax.dims import BD, BP, BPD, BTD, SegmentIds, Unbroken
from based_jax.errors import UserError, unknown
from based_jax.nn import layers, projections
from based_jax.nn.attention_heads import AttentionHeads, HeadsConfig
from based_jax.nn.cache import Cache, TokenCache
from based_jax.nn.eviction import POLICIES, BudgetCache, Policy
from based_jax.nn.mixer import check_sizes
from based_jax.ops import dispatch, segments, softmax_chunks
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.softmax import ATTENTION, attention, filled_head_dim, whole_pass_head_dim
from based_jax.ops.softmax_budget import own_attention, ring_attention
from based_jax.ops.softmax_prefill import attention_prefill
from based_jax.ops.softmax_step import ATTENTION_STEP_WEIGHTS, attention_step_weights, attention_weights


@dataclasses.dataclass(frozen=True)
class AttentionConfig(HeadsConfig):
    """Those of heads, and which keys and values decoding keeps; training and one pass see all.

    `cache_policy` is one of `eviction.POLICIES`; all but "full" keep up to `cache_budget` tokens, of which "streaming"
    keeps the first `cache_sinks`.
    """

    cache_policy: str = added_later("full")
    cache_budget: int | None = added_later(None)
    cache_sinks: int = added_later(4)

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, cache_sinks=0)
        if self.cache_policy not in POLICIES:
            raise unknown("cache_policy", self.cache_policy, POLICIES)
        policy = POLICIES[self.cache_policy]
        if (policy is None) != (self.cache_budget is None):
            held = "all tokens" if policy is None else "so many tokens"
            raise UserError(f"cache_budget is {self.cache_budget}; cache_policy '{self.cache_policy}' keeps {held}.")
        if policy is not None:
            check_sizes(self, cache_budget=policy.least + (self.cache_sinks if policy.moves_sinks else 0))


class Attention(AttentionHeads):
    """Causal multi-head attention; the cache holds every key and value, or those that a policy keeps.

    With a budget that is as large as the cache, decoding is that of "full", bit for bit. A prefill that does not fit a
    budget is read at once where tokens leave for their places ("window", "streaming"), and token by token where they
    leave for what they were paid.

    Source: HazyResearch/based:based/models/transformer/mha.py; zoology:zoology/mixers/attention.py with bias and
    without rotary; transformers:models/llama/modeling_llama.py with full rotary and grouped queries,
    models/qwen2/modeling_qwen2.py with biases, models/qwen3/modeling_qwen3.py with `qk_norm`.
    """

    Config: ClassVar = AttentionConfig
    IMPLEMENTATIONS: ClassVar = ATTENTION

    def __init__(self, d_model: int, config: AttentionConfig, init: layers.Init):
        super().__init__(d_model, config, init)
        self.policy = POLICIES[config.cache_policy]

    @property
    @override
    def rows_are_apart(self) -> bool:
        """Whether there is no budget: rows that fit into theirs are read alike until one does not."""
        return self.policy is None

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        q, k, v = self.rotated_qkv(x, jnp.zeros(1, jnp.int32), segment_ids, whole_pass_head_dim(self.head_dim))
        k, v, options = *map(self.for_each_query, (k, v)), {"head_dim": self.head_dim, "impl": self.config.impl}
        o = attention(q, k, v, segment_ids=segment_ids, **options)
        return self._out(*layers.at(positions, o))

    @override
    def _initial_state(self, batch: int, max_len: int) -> TokenCache:
        cache = self.empty_cache(batch, self._slots(max_len), filled_head_dim(self.head_dim))
        return cache if self.policy is None else BudgetCache.around(cache, self.policy, self.config.cache_sinks)

    def _slots(self, tokens: int) -> int:
        return tokens if self.policy is None else min(tokens, self.config.cache_budget)

    @override
    def _prefill(self, x: BTD, state: Any, segment_ids: SegmentIds | None) -> tuple[BTD, Any]:
        qkv = self.unrotated_qkv(x, state.tokens[0].shape[3])
        if self.policy is None:
            o, state = self._read_all(qkv, state, segment_ids)
        else:
            o, state = self._read_within(self.policy, qkv, state, segment_ids)
        return self._out(o), state

    @override
    def _step(self, x: BD, state: Any) -> tuple[BD | projections.Projected, Any]:
        qkv = self.unrotated_qkv(x[:, None])
        if self.policy is None:
            o, after = self.read_token(qkv, state)
            return self._out(o), after
        o, after = self._read_one(self.policy, self._token(qkv, state), state, jnp.ones(x.shape[0], bool))
        o = o[..., : self.head_dim]
        return self._out(o if self._evicts(state) else state.held(o, state.length)), after

    @override
    def _try_tokens(self, x: BTD, state: Any) -> tuple[BTD, Any]:
        if self.policy is not None:
            return super()._try_tokens(x, state)
        o, tokens = self.read_on_trial(x, state, is_ring=False)
        return self._out(state.held(o, state.length[:, None] + jnp.arange(x.shape[1])[None])), tokens

    @override
    def step_whole(self, r: BD, y: Pieces | None, norm: Any, cache: Cache) -> tuple[BD, Pieces, Cache] | None:
        return super().step_whole(r, y, norm, cache) if self.policy is None else None

    def _evicts(self, state: TokenCache) -> bool:
        """Return whether a full cache drops tokens; another one is as long as any document may be."""
        return self.policy is not None and state.slots == self.config.cache_budget

    def _read_all(self, qkv, state: TokenCache, segment_ids: SegmentIds | None):
        """Return what tokens read (B, T, H, D/H), NaN where they do not fit into the cache, and the cache with them."""
        state.check_room(qkv[0].shape[1], segment_ids)
        q, k, v = self._rotated(qkv, state.length, segment_ids)
        (past_k, past_v), there = state.tokens, jnp.minimum(state.length, state.slots)
        options = {"head_dim": self.head_dim, "impl": self.config.impl}
        o = attention_prefill(q, k, v, past_k, past_v, there, segment_ids=segment_ids, **options)
        places, _ = segments.positions(segment_ids, state.length, k.shape[1])
        present = True if segment_ids is None else segments.ids_of(segment_ids) != 0
        o = state.held(o, places, present)
        if not isinstance(state, BudgetCache):
            return o, state.extend((k, v), segment_ids)
        return o, self._paid(q, places, state.filled_up((k, v), qkv[1], segment_ids), state, segment_ids)

    def _paid(self, q, places, after: BudgetCache, before: BudgetCache, segment_ids: SegmentIds | None) -> BudgetCache:
        """Return the cache after what queries (B, T, H, .) of each row's last document have paid its tokens."""
        if not after.statistics or not self._evicts(after):
            return after
        _, last, _ = before.last_document(q.shape[1], segment_ids)
        seen = jnp.where(last, places + 1, 0)

        def pay(cache, token):
            return self._with_payment(cache, *token), None

        return jax.lax.scan(pay, after, (jnp.moveaxis(q, 1, 0), seen.T))[0]

    def _with_payment(self, cache: BudgetCache, q, seen) -> BudgetCache:
        weights = attention_weights(q, cache.tokens[0], seen, head_dim=self.head_dim)
        return cache.paid(weights, jnp.arange(cache.slots)[None] < seen[:, None])

    def _read_within(self, policy: Policy, qkv, state: BudgetCache, segment_ids: SegmentIds | None):
        """Return what tokens read (B, T, H, D/H), and the cache after them, which some have left where not all fit."""
        T = qkv[0].shape[1]
        if not self._evicts(state):
            return self._read_all(qkv, state, segment_ids)
        read_some = self._read_by_places if policy.dropped is None else self._read_one_by_one
        if segment_ids is None and state.slots < T:
            return read_some(policy, qkv, state, segment_ids)
        places, _ = segments.positions(segment_ids, state.length, T)
        present = True if segment_ids is None else segments.ids_of(segment_ids) != 0
        return jax.lax.cond(
            jnp.all((places < state.slots) | ~jnp.asarray(present)),
            lambda: self._read_all(qkv, state, segment_ids),
            lambda: read_some(policy, qkv, state, segment_ids),
        )

    def _read_by_places(self, policy: Policy, qkv, state: BudgetCache, segment_ids: SegmentIds | None):
        """Return the same where a token leaves for its place alone: no query waits for what those before it have seen.

        The tokens of the ring are read by a window, and the first tokens, which stand before it, apart.
        """
        if segment_ids is not None and not isinstance(segment_ids, Unbroken):
            order = segments.Order.of(segment_ids)
            qkv = [order.moved(x) for x in qkv]
            o, state = self._read_by_places(policy, qkv, state, Unbroken(order.moved(segment_ids)))
            return order.moved_back(o), state
        ids = Unbroken(jnp.ones(qkv[0].shape[:2], jnp.int32)) if segment_ids is None else segment_ids
        kept, (_, k, v) = policy.kept(state.slots, self.config.cache_sinks), self._rotated(qkv, state.length, ids)
        read = self._read_ring(kept, qkv, state, ids)
        if kept:
            read = softmax_chunks.joined(read, self._read_sinks(kept, qkv, state, ids))
        return read[0].astype(v.dtype), state.extended((k, v), qkv[1], ids, kept, self._turned)

    def _read_ring(self, kept: int, qkv, state: BudgetCache, ids: Unbroken):
        """Return what tokens read of the newest ones up to their own, but for the first of their document."""
        q, k, v = self._rotated(qkv, state.length, ids)
        past, there = state.ring(kept)
        keys, values = (self.for_each_query(jnp.concatenate(both, axis=1)) for both in zip(past, (k, v), strict=True))
        numbers, places = segments.numbered(ids), segments.positions(ids, state.length, k.shape[1])[0]
        key_numbers = jnp.concatenate([there.astype(numbers.dtype), jnp.where(places < kept, 0, numbers)], axis=1)
        return ring_attention(q, keys, values, numbers, key_numbers, root=math.sqrt(self.head_dim))

    def _read_sinks(self, kept: int, qkv, state: BudgetCache, ids: Unbroken):
        """Return what tokens read of the first ones of their document, which stand just before the ring."""
        T, numbers = qkv[0].shape[1], segments.numbered(ids)
        places = segments.positions(ids, state.length, T)[0]
        q = self._turned(qkv[0], jnp.minimum(places, state.slots - 1))
        _, k, v = self._rotated(qkv, state.length, ids)
        stand = jnp.arange(kept)[None, None]
        row = jnp.arange(T)[None, :, None] - places[..., None] + stand  # of each, before 0 in the cache

        def first(new, old):
            new = jax.vmap(lambda x, row: x[row])(new, jnp.clip(row, 0, T - 1))
            return self.for_each_query(jnp.where((row < 0)[..., None, None], old[:, None], new))

        old = self._turned(state.sinks, jnp.broadcast_to(stand[0], (len(numbers), kept))), state.tokens[1][:, :kept]
        keys, values = map(first, (k, v), old)
        visible = (stand <= places[..., None]) & (numbers != 0)[..., None]
        return own_attention(q, keys, values, visible, root=math.sqrt(self.head_dim))

    def _read_one_by_one(self, policy: Policy, qkv, state: BudgetCache, segment_ids: SegmentIds | None):
        B, T = qkv[0].shape[:2]
        numbers = jnp.ones((B, T), jnp.int32) if segment_ids is None else segments.numbered(segment_ids)

        def read(cache, token):
            qkv, present, begins = token
            cache = dataclasses.replace(cache, length=jnp.where(begins, 0, cache.length))
            return self._read_one(policy, qkv, cache, present)[::-1]

        tokens = *qkv, numbers != 0, segments.begins_later(numbers)
        *qkv, present, begins = (jnp.moveaxis(x, 1, 0) for x in tokens)
        state, o = jax.lax.scan(read, state, (qkv, present, begins))
        return jnp.moveaxis(o, 0, 1), state

    def _read_one(self, policy: Policy, qkv, cache: BudgetCache, rows):
        """Return what one token of some rows reads (B, H, .), and the cache after it; q, k, v (B, H, .) unrotated."""
        kept, place = policy.kept(cache.slots, self.config.cache_sinks), cache.length
        q, k, v = self._turned_token(qkv, place)
        cache = cache.with_kept(policy, kept, rows).appended((k, v), kept, rows)
        cache = cache.with_sinks(qkv[1], jnp.where(rows, place, cache.slots), self._turned)
        if not cache.statistics:
            return self._attended(q, cache), cache
        return self._attended_and_paid(q, cache, rows)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return a key and a value of each head for each token, or for each of a budget, and what a policy remembers.

        Equal to the cache's when `max_len` is `seq_len`, but on a GPU its heads end in zeros besides
        (`softmax.filled_head_dim`).
        """
        slots, width = self._slots(seq_len), self.kv_heads * self.head_dim
        if self.policy is None:
            return 2 * width * slots
        sinks = min(self.config.cache_sinks, slots) if self.policy.moves_sinks else 0
        return 2 * width * slots + self.kv_heads * len(self.policy.statistics) * slots + width * sinks

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, and scores and sums over half of `seq_len` keys on average."""
        return self.projection_flops() + 2 * self.inner_dim * min(seq_len, 2 * self._slots(seq_len))

    def _attended_and_paid(self, q, cache: BudgetCache, rows):
        """Return the same, and the cache after what the queries of some rows have paid its tokens."""
        (k, v), seen = cache.tokens, jnp.minimum(cache.length, cache.slots)
        impl = dispatch.beside(self.config.impl, ATTENTION_STEP_WEIGHTS)
        o, weights = attention_step_weights(q, k, v, seen, head_dim=self.head_dim, impl=impl)
        there = (jnp.arange(cache.slots)[None] < seen[:, None]) & rows[:, None]
        return o, cache.paid(jnp.where(rows[:, None, None], weights, 0.0), there)

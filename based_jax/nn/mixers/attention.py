"""Softmax attention with rotary positions: the mixer of Transformer++ (arXiv 2402.18668, section 5)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from based_jax import parallel
from based_jax.config import added_later
from based_jax.dims import BD, BP, BPD, BTD, SegmentIds, Unbroken
from based_jax.errors import UserError, unknown
from based_jax.nn import layers
from based_jax.nn.cache import Cache, TokenCache, TriedTokens
from based_jax.nn.eviction import POLICIES, BudgetCache, Policy
from based_jax.nn.mixer import Buffer, Mixer, check_positive, check_sizes
from based_jax.nn.rotary import check_scaling, scaling
from based_jax.ops import dispatch, segments, sequence, softmax_chunks
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.softmax import ATTENTION, attention, filled_head_dim, whole_pass_head_dim
from based_jax.ops.softmax_budget import own_attention, ring_attention
from based_jax.ops.softmax_prefill import attention_prefill
from based_jax.ops.softmax_step import (
    ATTENTION_STEP,
    ATTENTION_STEP_WEIGHTS,
    attention_step,
    attention_step_weights,
    attention_weights,
)
from based_jax.ops.softmax_trial import ATTENTION_TRIAL, attention_trial

QKV_KEYS = {
    "out_proj/kernel": "out_proj.weight",
    "out_proj/bias": "out_proj.bias",
    "qkv/kernel": "Wqkv.weight",
    "qkv/bias": "Wqkv.bias",
    "q_norm/scale": "q_norm.weight",
    "k_norm/scale": "k_norm.weight",
}
LLAMA_KEYS: dict[str, str | tuple[str, ...]] = {
    "out_proj/kernel": "o_proj.weight",
    "out_proj/bias": "o_proj.bias",
    "qkv/kernel": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "qkv/bias": ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
    "q_norm/scale": "q_norm.weight",
    "k_norm/scale": "k_norm.weight",
}


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Heads, the share of each head that rotary turns (0 for none), its base, biases, and the implementation.

    Each of `num_kv_heads` keys and values, as many as queries where None, serves as many queries (arXiv 2305.13245).
    A head has `head_dim` components, D / num_heads where None; the output has a bias if `out_bias`, where that is None
    if `bias`; with `qk_norm` an RMSNorm of each head stands between projection and rotary, for queries and for keys.
    `rotary_scaling` is one of `rotary.SCALINGS`, which the options `rotary_*` below it are for.
    """

    num_heads: int = 16
    num_kv_heads: int | None = None
    rotary_fraction: float = 0.5
    rotary_base: float = 10000.0
    bias: bool = False
    impl: str = "auto"
    head_dim: int | None = added_later(None)
    out_bias: bool | None = added_later(None)
    qk_norm: bool = added_later(False)
    rotary_scaling: str = added_later("none")
    rotary_factor: float = added_later(1.0)
    rotary_low_freq_factor: float = added_later(1.0)
    rotary_high_freq_factor: float = added_later(4.0)
    rotary_original_len: int = added_later(8192)

    def __post_init__(self):
        check_sizes(self, num_heads=1, rotary_original_len=1)
        if self.head_dim is not None:
            check_sizes(self, head_dim=1)
        if not 0 <= self.rotary_fraction <= 1:
            raise UserError(f"rotary_fraction is {self.rotary_fraction}; it is between 0 and 1.")
        check_positive(self, "rotary_base")
        check_scaling(self)
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise UserError(f"num_kv_heads is {kv_heads}; it divides num_heads, which is {self.num_heads}.")


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


class Attention(Mixer):
    """Causal multi-head attention; the cache holds every key and value, or those that a policy keeps.

    With a budget that is as large as the cache, decoding is that of "full", bit for bit. A prefill that does not fit a
    budget is read at once where tokens leave for their places ("window", "streaming"), and token by token where they
    leave for what they were paid.

    Source: HazyResearch/based:based/models/transformer/mha.py; zoology:zoology/mixers/attention.py with bias and
    without rotary; transformers:models/llama/modeling_llama.py with full rotary and grouped queries,
    models/qwen2/modeling_qwen2.py with biases, models/qwen3/modeling_qwen3.py with `qk_norm`.
    """

    Config: ClassVar[type[HeadsConfig]] = AttentionConfig
    IMPLEMENTATIONS: ClassVar = ATTENTION
    REFERENCE: ClassVar = {
        "based": QKV_KEYS,
        "zoology": QKV_KEYS,
        "llama": LLAMA_KEYS,
    }

    def __init__(self, d_model: int, config: HeadsConfig, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.head_dim = layers.head_dim(d_model, config.num_heads) if config.head_dim is None else config.head_dim
        self.kv_heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
        self.rotary_dim = layers.rotary_dim(self.head_dim, config.rotary_fraction)
        self.policy = POLICIES[config.cache_policy] if isinstance(config, AttentionConfig) else None
        self.inner_dim, keys = config.num_heads * self.head_dim, self.kv_heads * self.head_dim
        widths, out_bias = (self.inner_dim, keys, keys), config.bias if config.out_bias is None else config.out_bias
        self.qkv = layers.linear(d_model, sum(widths), ("embed", "heads"), init, bias=config.bias, parts=widths)
        if config.qk_norm:
            self.q_norm, self.k_norm = (layers.rms_norm(self.head_dim, init.norm_eps, rngs=init.rngs) for _ in "qk")
        self.out_proj = layers.linear(self.inner_dim, d_model, ("heads", "embed"), init.out, bias=out_bias)

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
    def _step(self, x: BD, state: Any) -> tuple[BD | layers.Projected, Any]:
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
    def _keep(self, tokens: Any, counts: Int[Array, "B"]) -> Any:
        return tokens.kept(counts) if isinstance(tokens, TriedTokens) else super()._keep(tokens, counts)

    @override
    def _emptied(self, state: TokenCache, rows: Bool[Array, "B"]) -> TokenCache:
        """Return the state whose rows have no token: what is in their slots is not seen, and need not be cleared."""
        return dataclasses.replace(state, length=jnp.where(rows, 0, state.length))

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
    def reference_buffers(self) -> Mapping[str, Buffer]:
        """Return the table of rotary's frequencies."""
        exponents = np.arange(0, self.rotary_dim, 2) / max(self.rotary_dim, 1)
        return {"rotary_emb.inv_freq": self.config.rotary_base**-exponents}

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

    def projection_flops(self) -> int:
        """Return the FLOPs of the projections."""
        return 4 * self.d_model * (self.inner_dim + self.kv_heads * self.head_dim)

    def for_each_query(self, x):
        """Return keys or values (..., kv heads, D/H) repeated for the queries that each of them serves."""
        return jnp.repeat(x, self.config.num_heads // self.kv_heads, axis=-2)

    def unrotated_qkv(self, x: BTD, width: int | None = None):
        """Return queries, keys and values (B, T, heads, D/H); with a `width` zeros fill the heads up to it."""
        heads = self.config.num_heads, self.kv_heads, self.kv_heads
        return self._head_normed(layers.split_to_heads(self.qkv, x, heads, width or self.head_dim))

    def _head_normed(self, qkv):
        q, k, v = qkv
        if not self.config.qk_norm:
            return [q, k, v]
        return [self._normed(self.q_norm, q), self._normed(self.k_norm, k), v]

    def _normed(self, norm: nnx.RMSNorm, heads):
        """Return the RMSNorm of heads that may end in zeros, over what stands before these."""
        normed = norm(heads[..., : self.head_dim]).astype(heads.dtype)
        return layers.with_zeros(normed, -1, heads.shape[-1])

    def rotated_qkv(self, x: BTD, before: Int[Array, "#B"], segment_ids: SegmentIds | None, width: int | None = None):
        """Return the same with queries and keys rotated by their place in their document.

        `before` counts the tokens that each row's first document has had.
        """
        return self._rotated(self.unrotated_qkv(x, width), before, segment_ids)

    def _rotated(self, qkv, before: Int[Array, "#B"], segment_ids: SegmentIds | None):
        q, k, v = qkv
        places, _ = sequence.positions(segment_ids, before, q.shape[1])
        return self._turned(q, places), self._turned(k, places), v

    def _turned(self, y, places):
        return layers.rotary(y, places, self.rotary_dim, self.config.rotary_base, scaling(self.config))

    def empty_cache(self, batch: int, slots: int, width: int) -> TokenCache:
        """Return the cache of so many keys and values before the first, whose heads end in zeros up to a width."""
        k, v = (jnp.zeros((batch, slots, self.kv_heads, width), self.dtype) for _ in "kv")
        return TokenCache.empty((k, v))

    @override
    def step_whole(self, r: BD, y: Pieces | None, norm: Any, cache: Cache) -> tuple[BD, Pieces, Cache] | None:
        """Mix the norm of r + y of one sequence's token, where all tokens are kept and projections have no biases."""
        has_biases = self.qkv.bias is not None or self.out_proj.bias is not None
        if self.policy is not None or has_biases or not self.has_joint_heads:
            return None
        r, [z] = layers.several_of_norm([self.qkv], norm, r, y)
        o, state = self.read_joint(layers.split_heads(z, self._joint_count), cache.state)
        pieces = layers.in_pieces(self.out_proj, layers.merge_heads(o), None if y is None else y.marks)
        return r, pieces, cache._replace(state=state)

    def read_joint(self, heads: Float[Array, "B joint K"], state: TokenCache):
        """Return what `read_token` does of a token's queries, keys and values beside each other."""
        ends = [self.config.num_heads, self.config.num_heads + self.kv_heads]
        return self.read_token(self._head_normed(layers.split(heads[:, None], ends, axis=-2)), state)

    def read_token(self, qkv, state: TokenCache):
        """Return what a token reads (B, H, D/H), NaN where it does not fit, and the state after it.

        Its queries, keys and values (B, 1, heads, D/H) are not rotated.
        """
        o, after = self.read_newest(qkv, state)
        return state.held(o, state.length), after

    def read_newest(self, qkv, state: TokenCache):
        """Return the same where each token has a slot."""
        q, k, v = self._turned_token(self._token(qkv, state), state.length)
        state = state.append((k, v))
        return self._attended(q, state)[..., : self.head_dim], state

    @property
    def has_joint_heads(self) -> bool:
        """Whether no device has a share of each of queries, keys and values alone, which stand beside each other."""
        return parallel.channel_pieces(self.config.num_heads, self.kv_heads, self.kv_heads) == 1

    @property
    def _joint_count(self) -> int:
        return self.config.num_heads + 2 * self.kv_heads

    def read_on_trial(self, x: BTD, state: TokenCache, *, is_ring: bool) -> tuple[Any, TriedTokens]:
        """Return what queries of tokens (B, T, H, D/H) read of the cache and of each other, and the tokens."""
        q, k, v = self._rotated(self.unrotated_qkv(x, state.tokens[0].shape[3]), state.length, None)
        (past_k, past_v), impl = state.tokens, dispatch.beside(self.config.impl, ATTENTION_TRIAL)
        places = {"is_ring": is_ring}
        o = attention_trial(q, k, v, past_k, past_v, state.length, **places, head_dim=self.head_dim, impl=impl)
        return o, TriedTokens((k, v), state)

    def _token(self, qkv, state: TokenCache):
        """Return a token's queries, keys and values (B, heads, .), as wide as the cache's and not rotated.

        Zeros behind the weights would be made anew for each token.
        """
        return [layers.with_zeros(y[:, 0], 2, state.tokens[0].shape[3]) for y in qkv]

    def _turned_token(self, token, place: Int[Array, "B"]):
        return (y[:, 0] for y in self._rotated([y[:, None] for y in token], place, None))

    def _attended(self, q, state: TokenCache):
        """Return what a token's queries read of the slots that are filled."""
        (k, v), there = state.tokens, jnp.minimum(state.length, state.slots)
        impl = dispatch.beside(self.config.impl, ATTENTION_STEP)
        return attention_step(q, k, v, there, head_dim=self.head_dim, impl=impl)

    def _attended_and_paid(self, q, cache: BudgetCache, rows):
        """Return the same, and the cache after what the queries of some rows have paid its tokens."""
        (k, v), seen = cache.tokens, jnp.minimum(cache.length, cache.slots)
        impl = dispatch.beside(self.config.impl, ATTENTION_STEP_WEIGHTS)
        o, weights = attention_step_weights(q, k, v, seen, head_dim=self.head_dim, impl=impl)
        there = (jnp.arange(cache.slots)[None] < seen[:, None]) & rows[:, None]
        return o, cache.paid(jnp.where(rows[:, None, None], weights, 0.0), there)

    def _out(self, o):
        return layers.from_heads(self.out_proj, o)

"""Based's local mixer: exact softmax attention over a short sliding window (arXiv 2402.18668, section 4.2)."""

import dataclasses
from typing import Any, ClassVar, override

import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.config import added_later
from based_jax.dims import BD, BP, BPD, BTD, SegmentIds, Unbroken
from based_jax.nn import layers, multihead, projections
from based_jax.nn.attention_heads import AttentionHeads, HeadsConfig
from based_jax.nn.cache import SinkCache, TokenCache
from based_jax.nn.mixer import check_sizes
from based_jax.nn.rotary import scaling
from based_jax.ops import segments, window_attention
from based_jax.ops.ring_step import ring_step
from based_jax.ops.softmax import WINDOW_ATTENTION


@dataclasses.dataclass(frozen=True)
class WindowConfig(HeadsConfig):
    """As full attention, and the window: the number of keys that a query sees, its own included.

    It sees the first `sinks` tokens of its document besides, at their places in the text (arXiv 2309.17453).
    The released models' `window_size` of 256 is a window of 129: flash-attention counts half of it to the left.
    """

    rotary_fraction: float = 1.0
    window: int = 64
    sinks: int = added_later(0)

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, window=1, sinks=0)


class WindowAttention(AttentionHeads):
    """Attention whose cache is a ring of `window` keys and values, behind the sinks where there are some.

    Source: HazyResearch/based:based/models/mixers/slide_attention.py; zoology:zoology/mixers/slide_attn.py with bias,
    one head and no rotary; the `sliding_window` of transformers:models/mistral/modeling_mistral.py.
    """

    Config: ClassVar = WindowConfig
    IMPLEMENTATIONS: ClassVar = WINDOW_ATTENTION
    config: WindowConfig

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        q, k, v = self.rotated_qkv(x, jnp.zeros(1, jnp.int32), segment_ids)
        k, v = self.for_each_query(k), self.for_each_query(v)
        o = self._read_windows(q, k, v, segment_ids)
        return self._out(*layers.at(positions, o))

    @override
    def _initial_state(self, batch: int, max_len: int) -> TokenCache:
        """Return an empty ring of `window` slots, behind those of the sinks."""
        cache = self.empty_cache(batch, self._kept_tokens, self.head_dim)
        return SinkCache(cache.tokens, cache.length, self.config.sinks) if self.config.sinks else cache

    @property
    def _kept_tokens(self) -> int:
        return self.config.window + self.config.sinks

    def _read_windows(self, q, k, v, segment_ids: SegmentIds | None):
        """Return what queries (B, T, H, D/H) read of keys and values that stand beside them."""
        options: dict[str, Any] = {"window": self.config.window, "sinks": self.config.sinks, "impl": self.config.impl}
        return window_attention(q, k, v, segment_ids=segment_ids, **options)

    @override
    def _prefill(self, x: BTD, state: TokenCache, segment_ids: SegmentIds | None) -> tuple[BTD, TokenCache]:
        o, state = self._read_kept(self.rotated_qkv(x, state.length, segment_ids), state, segment_ids)
        return self._out(o), state

    def _read_kept(self, qkv, state: TokenCache, segment_ids: SegmentIds | None):
        """Return what queries (B, T, H, D/H) read of the cache and of each other, and the cache with the tokens."""
        q, k, v = qkv
        past, there = state.in_order()
        given = Unbroken(jnp.ones(q.shape[:2], jnp.int32)) if segment_ids is None else segment_ids
        numbers = segments.numbered(given)
        keys, values = (self.for_each_query(jnp.concatenate(both, axis=1)) for both in zip(past, (k, v), strict=True))
        ids = segments.known_alike(jnp.concatenate([there.astype(numbers.dtype), numbers], axis=1), given)
        o = self._read_windows(jnp.pad(q, [(0, 0), (state.slots, 0), (0, 0), (0, 0)]), keys, values, ids)
        return o[:, state.slots :], state.extend((k, v), segment_ids)

    @override
    def _step(self, x: BD, state: TokenCache) -> tuple[BD | projections.Projected, TokenCache]:
        if self.has_joint_heads:
            o, state = self.read_joint(multihead.split_heads(self.qkv(x), self._joint_count), state)
        else:
            o, state = self.read_token(self.unrotated_qkv(x[:, None]), state)
        return self._out(o), state

    @override
    def read_token(self, qkv, state: TokenCache):
        """Return what a token reads (B, H, D/H), and the state after it: in a ring each token has a slot."""
        return self.read_newest(qkv, state)

    @override
    def read_joint(self, heads: Float[Array, "B joint K"], state: TokenCache):
        is_plain = self.rotary_dim == self.head_dim and not (self.config.qk_norm or self.config.sinks)
        if not is_plain or self.config.impl != "auto":
            return super().read_joint(heads, state)
        angles = multihead.rotary_angles(state.length, self.rotary_dim, self.config.rotary_base, scaling(self.config))
        keys, values = state.tokens
        o, *ring = ring_step(heads, keys, values, state.length, angles)
        return o, TokenCache(tuple(ring), state.length + 1)

    @override
    def _try_tokens(self, x: BTD, state: TokenCache) -> tuple[BTD, Any]:
        if self.config.sinks:
            return super()._try_tokens(x, state)
        o, tokens = self.read_on_trial(x, state, is_ring=True)
        return self._out(o), tokens

    @override
    def state_size(self, seq_len: int) -> int:
        """Return a key and a value of each head for each of `window` tokens and of the sinks; equal to the cache's."""
        return 2 * self.kv_heads * self.head_dim * self._kept_tokens

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return the keys and values of the tokens before the query, as zoology counts: without its own."""
        return 2 * self.kv_heads * self.head_dim * (self._kept_tokens - 1)

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, and scores and sums over the window."""
        return self.projection_flops() + 4 * self.inner_dim * min(self._kept_tokens, seq_len)

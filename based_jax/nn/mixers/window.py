"""Based's local mixer: exact softmax attention over a short sliding window (arXiv 2402.18668, section 4.2)."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp

from based_jax.dims import BP, BPD, BT, BTD
from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.cache import KVCache
from based_jax.nn.mixers import attention
from based_jax.ops import window_attention
from based_jax.ops.softmax import WINDOW_ATTENTION


@dataclasses.dataclass(frozen=True)
class WindowConfig(attention.AttentionConfig):
    """As full attention, and the window: the number of keys that a query sees, its own included.

    The released models' `window_size` of 256 is a window of 129: flash-attention counts half of it to the left.
    """

    rotary_fraction: float = 1.0
    window: int = 64


class WindowAttention(attention.Attention):
    """Attention whose cache is a ring of `window` keys and values.

    Source: HazyResearch/based:based/models/mixers/slide_attention.py; zoology:zoology/mixers/slide_attn.py with bias,
    one head and no rotary.
    """

    Config: ClassVar = WindowConfig
    IMPLEMENTATIONS: ClassVar = WINDOW_ATTENTION
    REFERENCE: ClassVar = dict.fromkeys(("based", "zoology"), attention.QKV_KEYS)
    config: WindowConfig

    def __init__(self, d_model: int, config: WindowConfig, init: layers.Init):
        if config.window < 1:
            raise UserError(f"window is {config.window}; it counts the query's own key, so it is at least 1.")
        super().__init__(d_model, config, init)

    @override
    def __call__(self, x: BTD, segment_ids: BT | None = None, positions: BP | None = None) -> BPD:
        q, k, v = self.rotated_qkv(x, 0)
        k, v = self.for_each_query(k), self.for_each_query(v)
        o = window_attention(q, k, v, window=self.config.window, segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, o))

    @override
    def init_cache(self, batch: int, max_len: int) -> KVCache:
        """Return an empty ring of `window` slots."""
        return KVCache.empty(batch, self.config.window, self.kv_heads, self.head_dim, self.dtype)

    @override
    def prefill(self, x: BTD, cache: KVCache, segment_ids: BT | None = None) -> tuple[BTD, KVCache]:
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        q, k, v = self.rotated_qkv(x, cache.length)
        past = cache.in_order()
        o = window_attention(
            jnp.concatenate([jnp.zeros((q.shape[0], cache.slots, *q.shape[2:]), q.dtype), q], axis=1),
            self.for_each_query(jnp.concatenate([past.k, k], axis=1)),
            self.for_each_query(jnp.concatenate([past.v, v], axis=1)),
            window=self.config.window,
            segment_ids=jnp.concatenate([cache.past_ids(ids), ids], axis=1),
            impl=self.config.impl,
        )
        return self._out(o[:, cache.slots :]), cache.extend(k, v, ids)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return a key and a value of each head for each of `window` tokens; equal to the cache's."""
        return 2 * self.kv_heads * self.head_dim * self.config.window

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return the keys and values of the tokens before the query, as zoology counts: without its own."""
        return 2 * self.kv_heads * self.head_dim * (self.config.window - 1)

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, and scores and sums over the window."""
        return self.projection_flops() + 4 * self.d_model * min(self.config.window, seq_len)

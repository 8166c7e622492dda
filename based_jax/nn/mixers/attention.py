"""Softmax attention with rotary positions: the mixer of Transformer++ (arXiv 2402.18668, section 5)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.cache import TokenCache
from based_jax.nn.mixer import Buffer, Mixer, check_positive, check_sizes
from based_jax.ops import dispatch, segments, sequence
from based_jax.ops.softmax import ATTENTION, attention, filled_head_dim
from based_jax.ops.softmax_prefill import attention_prefill
from based_jax.ops.softmax_step import ATTENTION_STEP, attention_step

QKV_KEYS = {
    "out_proj/kernel": "out_proj.weight",
    "out_proj/bias": "out_proj.bias",
    "qkv/kernel": "Wqkv.weight",
    "qkv/bias": "Wqkv.bias",
}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Heads, the share of each head that rotary turns (0 for none), its base, biases, and the implementation.

    Each of `num_kv_heads` keys and values, as many as queries where None, serves as many queries (arXiv 2305.13245).
    """

    num_heads: int = 16
    num_kv_heads: int | None = None
    rotary_fraction: float = 0.5
    rotary_base: float = 10000.0
    bias: bool = False
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, num_heads=1)
        if not 0 <= self.rotary_fraction <= 1:
            raise UserError(f"rotary_fraction is {self.rotary_fraction}; it is between 0 and 1.")
        check_positive(self, "rotary_base")
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise UserError(f"num_kv_heads is {kv_heads}; it divides num_heads, which is {self.num_heads}.")


class Attention(Mixer):
    """Causal multi-head attention; the cache holds every key and value.

    Source: HazyResearch/based:based/models/transformer/mha.py; zoology:zoology/mixers/attention.py with bias and
    without rotary; transformers:models/llama/modeling_llama.py with full rotary and grouped queries.
    """

    Config: ClassVar = AttentionConfig
    IMPLEMENTATIONS: ClassVar = ATTENTION
    REFERENCE: ClassVar = {
        "based": QKV_KEYS,
        "zoology": QKV_KEYS,
        "llama": {
            "out_proj/kernel": "o_proj.weight",
            "qkv/kernel": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        },
    }

    def __init__(self, d_model: int, config: AttentionConfig, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.head_dim = layers.head_dim(d_model, config.num_heads)
        self.kv_heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
        self.rotary_dim = layers.rotary_dim(self.head_dim, config.rotary_fraction)
        bias, widths = config.bias, (d_model, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)
        self.qkv = layers.linear(d_model, sum(widths), ("embed", "heads"), init, bias=bias, parts=widths)
        self.out_proj = layers.linear(d_model, d_model, ("heads", "embed"), init.out, bias=bias)

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        q, k, v = self.rotated_qkv(x, jnp.zeros(1, jnp.int32), segment_ids, filled_head_dim(self.head_dim))
        k, v, options = *map(self.for_each_query, (k, v)), {"head_dim": self.head_dim, "impl": self.config.impl}
        o = attention(q, k, v, segment_ids=segment_ids, **options)
        return self._out(*layers.at(positions, o))

    @override
    def _initial_state(self, batch: int, max_len: int) -> TokenCache:
        return self.empty_cache(batch, max_len, filled_head_dim(self.head_dim))

    @override
    def _prefill(self, x: BTD, state: TokenCache, segment_ids: SegmentIds | None) -> tuple[BTD, TokenCache]:
        state.check_room(x.shape[1], segment_ids)
        q, k, v = self.rotated_qkv(x, state.length, segment_ids, state.tokens[0].shape[3])
        options = {"head_dim": self.head_dim, "impl": self.config.impl}
        there = jnp.minimum(state.length, state.slots)
        o = attention_prefill(q, k, v, *state.tokens, there, segment_ids=segment_ids, **options)
        places, _ = segments.positions(segment_ids, state.length, x.shape[1])
        present = True if segment_ids is None else segments.ids_of(segment_ids) != 0
        return self._out(state.held(o, places, present)), state.extend((k, v), segment_ids)

    @override
    def _step(self, x: BD, state: TokenCache) -> tuple[BD, TokenCache]:
        o, after = self.read_token(x, state)
        return self._out(state.held(o, state.length)), after

    @override
    def reference_buffers(self) -> Mapping[str, Buffer]:
        """Return the table of rotary's frequencies."""
        exponents = np.arange(0, self.rotary_dim, 2) / max(self.rotary_dim, 1)
        return {"rotary_emb.inv_freq": self.config.rotary_base**-exponents}

    @override
    def state_size(self, seq_len: int) -> int:
        """Return a key and a value of each head for each token; equal to the cache's when `max_len` is `seq_len`.

        On a GPU the cache's heads end in zeros besides (`softmax.filled_head_dim`), which are not counted.
        """
        return 2 * self.kv_heads * self.head_dim * seq_len

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, and scores and sums over half of `seq_len` keys on average."""
        return self.projection_flops() + 2 * self.d_model * seq_len

    def projection_flops(self) -> int:
        """Return the FLOPs of the projections."""
        return 4 * self.d_model * (self.d_model + self.kv_heads * self.head_dim)

    def for_each_query(self, x):
        """Return keys or values (B, S, kv heads, D/H) repeated for the queries that each of them serves."""
        return jnp.repeat(x, self.config.num_heads // self.kv_heads, axis=2)

    def rotated_qkv(self, x: BTD, before: Int[Array, "#B"], segment_ids: SegmentIds | None, width: int | None = None):
        """Return queries and keys rotated by their place in their document, and values: (B, T, heads, D/H).

        `before` counts the tokens that each row's first document has had. With a `width` zeros fill the heads up to it.
        """
        y = layers.to_heads(self.qkv, x, self.config.num_heads + 2 * self.kv_heads, width or self.head_dim)
        q, k, v = layers.split(y, [self.config.num_heads, self.config.num_heads + self.kv_heads], axis=-2)
        places, _ = sequence.positions(segment_ids, before, x.shape[1])
        q, k = (layers.rotary(y, places, self.rotary_dim, self.config.rotary_base) for y in (q, k))
        return q, k, v

    def empty_cache(self, batch: int, slots: int, width: int) -> TokenCache:
        """Return the cache of so many keys and values before the first, whose heads end in zeros up to a width."""
        k, v = (jnp.zeros((batch, slots, self.kv_heads, width), self.dtype) for _ in "kv")
        return TokenCache.empty((k, v))

    def read_token(self, x: BD, state: TokenCache):
        """Return what a token's queries read (B, H, D/H), and the state after it."""
        width = state.tokens[0].shape[3]
        qkv = self.rotated_qkv(x[:, None], state.length, None)  # zeros behind weights would be made for each token
        q, k, v = (layers.with_zeros(y[:, 0], 2, width) for y in qkv)
        state = state.append((k, v))
        there = jnp.minimum(state.length, state.slots)
        impl = dispatch.beside(self.config.impl, ATTENTION_STEP)
        o = attention_step(q, *state.tokens, there, head_dim=self.head_dim, impl=impl)
        return o[..., : self.head_dim], state

    def _out(self, o):
        return layers.from_heads(self.out_proj, o)

"""Heads of queries, keys and values: what mixers of softmax attention share, and how a token reads a cache of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, override

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from based_jax import parallel
from based_jax.config import added_later
from based_jax.dims import BD, BTD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers, multihead, projections
from based_jax.nn.cache import Cache, TokenCache, TriedTokens
from based_jax.nn.mixer import Buffer, Mixer, check_positive, check_sizes
from based_jax.nn.rotary import check_scaling, scaling
from based_jax.ops import dispatch, sequence
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.softmax_step import ATTENTION_STEP, attention_step
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


class AttentionHeads(Mixer):
    """Projections into heads and back, rotary, and a cache of keys and values that a token reads.

    Sources: those of `mixers/attention.py` and `mixers/window.py`, which say what is read.
    """

    Config: ClassVar[type[HeadsConfig]] = HeadsConfig
    REFERENCE: ClassVar = {"based": QKV_KEYS, "zoology": QKV_KEYS, "llama": LLAMA_KEYS}

    def __init__(self, d_model: int, config: HeadsConfig, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.head_dim = multihead.head_dim(d_model, config.num_heads) if config.head_dim is None else config.head_dim
        self.kv_heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
        self.rotary_dim = multihead.rotary_dim(self.head_dim, config.rotary_fraction)
        self.inner_dim, keys = config.num_heads * self.head_dim, self.kv_heads * self.head_dim
        widths, out_bias = (self.inner_dim, keys, keys), config.bias if config.out_bias is None else config.out_bias
        self.qkv = layers.linear(d_model, sum(widths), ("embed", "heads"), init, bias=config.bias, parts=widths)
        if config.qk_norm:
            self.q_norm, self.k_norm = (layers.rms_norm(self.head_dim, init.norm_eps, rngs=init.rngs) for _ in "qk")
        self.out_proj = layers.linear(self.inner_dim, d_model, ("heads", "embed"), init.out, bias=out_bias)

    def for_each_query(self, x):
        """Return keys or values (..., kv heads, D/H) repeated for the queries that each of them serves."""
        return jnp.repeat(x, self.config.num_heads // self.kv_heads, axis=-2)

    def unrotated_qkv(self, x: BTD, width: int | None = None):
        """Return queries, keys and values (B, T, heads, D/H); with a `width` zeros fill the heads up to it."""
        heads = self.config.num_heads, self.kv_heads, self.kv_heads
        return self._head_normed(multihead.split_to_heads(self.qkv, x, heads, width or self.head_dim))

    def _head_normed(self, qkv):
        q, k, v = qkv
        if not self.config.qk_norm:
            return [q, k, v]
        return [self._normed(self.q_norm, q), self._normed(self.k_norm, k), v]

    def _normed(self, norm: nnx.RMSNorm, heads):
        """Return the RMSNorm of heads that may end in zeros, over what stands before these."""
        normed = norm(heads[..., : self.head_dim]).astype(heads.dtype)
        return multihead.with_zeros(normed, -1, heads.shape[-1])

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
        return multihead.rotary(y, places, self.rotary_dim, self.config.rotary_base, scaling(self.config))

    def empty_cache(self, batch: int, slots: int, width: int) -> TokenCache:
        """Return the cache of so many keys and values before the first, whose heads end in zeros up to a width."""
        k, v = (jnp.zeros((batch, slots, self.kv_heads, width), self.dtype) for _ in "kv")
        return TokenCache.empty((k, v))

    @override
    def _emptied(self, state: TokenCache, rows: Bool[Array, "B"]) -> TokenCache:
        """Return the state whose rows have no token: what is in their slots is not seen, and need not be cleared."""
        return dataclasses.replace(state, length=jnp.where(rows, 0, state.length))

    @override
    def step_whole(self, r: BD, y: Pieces | None, norm: Any, cache: Cache) -> tuple[BD, Pieces, Cache] | None:
        """Mix the norm of r + y of one sequence's token, where projections have no biases."""
        has_biases = self.qkv.bias is not None or self.out_proj.bias is not None
        if has_biases or not self.has_joint_heads:
            return None
        r, [z] = projections.several_of_norm([self.qkv], norm, r, y)
        o, state = self.read_joint(multihead.split_heads(z, self._joint_count), cache.state)
        pieces = projections.in_pieces(self.out_proj, multihead.merge_heads(o), None if y is None else y.marks)
        return r, pieces, cache._replace(state=state)

    @property
    def has_joint_heads(self) -> bool:
        """Whether no device has a share of each of queries, keys and values alone, which stand beside each other."""
        return parallel.channel_pieces(self.config.num_heads, self.kv_heads, self.kv_heads) == 1

    @property
    def _joint_count(self) -> int:
        return self.config.num_heads + 2 * self.kv_heads

    def read_joint(self, heads: Float[Array, "B joint K"], state: TokenCache):
        """Return what `read_token` does of a token's queries, keys and values beside each other."""
        ends = [self.config.num_heads, self.config.num_heads + self.kv_heads]
        return self.read_token(self._head_normed(projections.split(heads[:, None], ends, axis=-2)), state)

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

    def read_on_trial(self, x: BTD, state: TokenCache, *, is_ring: bool) -> tuple[Any, TriedTokens]:
        """Return what queries of tokens (B, T, H, D/H) read of the cache and of each other, and the tokens."""
        q, k, v = self._rotated(self.unrotated_qkv(x, state.tokens[0].shape[3]), state.length, None)
        (past_k, past_v), impl = state.tokens, dispatch.beside(self.config.impl, ATTENTION_TRIAL)
        places = {"is_ring": is_ring}
        o = attention_trial(q, k, v, past_k, past_v, state.length, **places, head_dim=self.head_dim, impl=impl)
        return o, TriedTokens((k, v), state)

    @override
    def _keep(self, tokens: Any, counts: Int[Array, "B"]) -> Any:
        return tokens.kept(counts) if isinstance(tokens, TriedTokens) else super()._keep(tokens, counts)

    def _token(self, qkv, state: TokenCache):
        """Return a token's queries, keys and values (B, heads, .), as wide as the cache's and not rotated.

        Zeros behind the weights would be made anew for each token.
        """
        return [multihead.with_zeros(y[:, 0], 2, state.tokens[0].shape[3]) for y in qkv]

    def _turned_token(self, token, place: Int[Array, "B"]):
        return (y[:, 0] for y in self._rotated([y[:, None] for y in token], place, None))

    def _attended(self, q, state: TokenCache):
        """Return what a token's queries read of the slots that are filled."""
        (k, v), there = state.tokens, jnp.minimum(state.length, state.slots)
        impl = dispatch.beside(self.config.impl, ATTENTION_STEP)
        return attention_step(q, k, v, there, head_dim=self.head_dim, impl=impl)

    def _out(self, o):
        return multihead.from_heads(self.out_proj, o)

    @override
    def reference_buffers(self) -> Mapping[str, Buffer]:
        """Return the table of rotary's frequencies."""
        exponents = np.arange(0, self.rotary_dim, 2) / max(self.rotary_dim, 1)
        return {"rotary_emb.inv_freq": self.config.rotary_base**-exponents}

    def projection_flops(self) -> int:
        """Return the FLOPs of the projections."""
        return 4 * self.d_model * (self.inner_dim + self.kv_heads * self.head_dim)

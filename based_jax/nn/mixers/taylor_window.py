"""A window and Taylor attention over one set of queries, keys and values: what attention is linearised to.

    o_i = (1 - g_i) window(q, k, v)_i + g_i taylor(A q, B k, v)_i        g_i = sigmoid(x_i W + b), one of each head

The window is exact softmax attention to the last keys, with sinks if asked for; Taylor attention (arXiv 2402.18668)
reads the whole past through learned maps to K components, A of each query head and B of each key head, after rotary.
All other parameters are attention's own, so that a trained layer of attention turns into this one
(`convert.taylor_window_from_attention`).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from based_jax.dims import BD, BHEV, BP, BPD, BTD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers, projections
from based_jax.nn.cache import Cache, TokenCache
from based_jax.nn.mixer import Mixer
from based_jax.nn.mixers.window import WindowAttention, WindowConfig
from based_jax.ops import taylor
from based_jax.ops.dispatch import beside
from based_jax.ops.linear_attention import normalise, with_ones
from based_jax.ops.precision import EXACT, einsum

FIRST_GATE = -2.0
"""What b starts with: Taylor attention has 0.12 of the output, and a model that is converted is nearly its windows."""


@dataclasses.dataclass(frozen=True)
class TaylorWindowConfig(WindowConfig):
    """Those of a window, and the components K of a head that Taylor attention has."""

    feature_dim: int = 16

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.feature_dim <= 32:
            raise UserError(f"feature_dim is {self.feature_dim}; Taylor attention takes 1 to 32.")


class TaylorWindowState(NamedTuple):
    """The window's ring of keys and values, and Taylor attention's sums (B, G, E, V+1), of each of G keys."""

    ring: TokenCache
    sums: BHEV


class TaylorWindow(WindowAttention):
    """A window beside Taylor attention to all tokens, mixed by a gate of each head.

    Queries that share a key share its sums.

    Source: the mean of both as in Liger (arXiv 2503.01496, equation 9, where it is constant), windows beside learned
    maps that are trained to give attention's output as in LoLCATs (arXiv 2410.10254, section 3.2), Based's map.
    """

    Config: ClassVar = TaylorWindowConfig
    REFERENCE: ClassVar = {}
    config: TaylorWindowConfig

    def __init__(self, d_model: int, config: TaylorWindowConfig, init: layers.Init):
        super().__init__(d_model, config, init)

        def maps(heads: int) -> nnx.Param:
            values = jax.random.normal(init.rngs.params(), (heads, self.head_dim, config.feature_dim))
            return nnx.Param(values / self.head_dim**0.5, **layers.logical_axes("heads", None, None))

        self.query_maps, self.key_maps = maps(config.num_heads), maps(self.kv_heads)
        self.gate = layers.linear(d_model, config.num_heads, ("embed", "heads"), init, bias=True)
        assert self.gate.bias is not None
        self.gate.bias[...] = jnp.full(config.num_heads, FIRST_GATE)

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        q, k, v = self.rotated_qkv(x, jnp.zeros(1, jnp.int32), segment_ids)
        near = self._read_windows(q, self.for_each_query(k), self.for_each_query(v), segment_ids)
        far, _ = self._read_all_tokens(q, k, v, None, segment_ids)
        return self._out(*layers.at(positions, self._mixed(x, near, far)))

    @override
    def _initial_state(self, batch: int, max_len: int) -> Any:
        ring = super()._initial_state(batch, max_len)
        return TaylorWindowState(
            ring, taylor.initial_state(batch, self.kv_heads, self.config.feature_dim, self.head_dim)
        )

    @override
    def _prefill(self, x: BTD, state: Any, segment_ids: SegmentIds | None) -> tuple[BTD, Any]:
        q, k, v = self.rotated_qkv(x, state.ring.length, segment_ids)
        near, ring = self._read_kept((q, k, v), state.ring, segment_ids)
        far, sums = self._read_all_tokens(q, k, v, state.sums, segment_ids)
        return self._out(self._mixed(x, near, far)), TaylorWindowState(ring, sums)

    @override
    def _step(self, x: BD, state: Any) -> tuple[BD | projections.Projected, Any]:
        qkv = self.unrotated_qkv(x[:, None])
        near, ring = self.read_token(qkv, state.ring)
        q, k, v = self._turned_token([y[:, 0] for y in qkv], state.ring.length)
        q, k = self._mapped(q, k)
        phi_q, phi_k = (taylor.taylor_features(y) for y in (q, k))
        sums = state.sums + phi_k[..., :, None] * with_ones(v)[..., None, :]
        phi_q = phi_q.reshape(len(x), self.kv_heads, -1, phi_q.shape[-1])
        read = einsum("BGRE,BGEV->BGRV", phi_q, sums, EXACT).reshape(len(x), -1, sums.shape[-1])
        far = normalise(read).astype(v.dtype)
        return self._out(self._mixed(x, near, far)), TaylorWindowState(ring, sums)

    @override
    def step_whole(self, r, y, norm, cache: Cache) -> None:
        return None

    @override
    def _try_tokens(self, x: BTD, state: Any) -> tuple[BTD, Any]:
        return Mixer._try_tokens(self, x, state)

    @override
    def _emptied(self, state: Any, rows: Bool[Array, "B"]) -> Any:
        sums = jnp.where(rows[:, None, None, None], 0.0, state.sums)
        return TaylorWindowState(super()._emptied(state.ring, rows), sums)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return the window's keys and values, and G (V+1) E elements of sums; equal to the cache's."""
        return super().state_size(seq_len) + self._sum_elements

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return the window's without the query's own token, and the sums."""
        return super().published_state_size(seq_len) + self._sum_elements

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: those of a window, maps, gate, and writing and reading the sums once."""
        heads = self.config.num_heads + self.kv_heads
        maps = 2 * heads * self.head_dim * self.config.feature_dim + 2 * self.d_model * self.config.num_heads
        return super().flops_per_token(seq_len) + maps + 2 * heads * self._sum_elements // self.kv_heads

    @property
    def _sum_elements(self) -> int:
        return self.kv_heads * (self.head_dim + 1) * taylor.expanded_dim(self.config.feature_dim)

    def _mapped(self, q: Float[Array, "*T H K"], k: Float[Array, "*T G K"]):
        """Return queries and keys as Taylor attention has them."""
        maps = (self.query_maps, self.key_maps)
        return (jnp.einsum("...HK,HKF->...HF", y, x[...].astype(y.dtype)) for y, x in zip((q, k), maps, strict=True))

    def _read_all_tokens(self, q, k, v, sums: BHEV | None, segment_ids: SegmentIds | None):
        """Return what tokens read of the whole past (B, T, H, D/H), and the sums after them."""
        q, k = self._mapped(q, k)
        k, v = self.for_each_query(k), self.for_each_query(v)
        repeats = self.config.num_heads // self.kv_heads
        before = None if sums is None else jnp.repeat(sums, repeats, axis=1)
        impl = beside(self.config.impl, taylor.IMPLEMENTATIONS)
        o, after = taylor.taylor_attention(q, k, v, state=before, segment_ids=segment_ids, impl=impl)
        return o, after[:, ::repeats]

    def _mixed(self, x: Float[Array, "*T D"], near: Array, far: Array):
        """Return both (.., H, D/H) by their shares."""
        share = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))[..., None]
        return (near + share * (far.astype(jnp.float32) - near)).astype(near.dtype)

"""RWKV-7 (Goose): a generalised delta rule with decays, rates and removal keys from the input (arXiv 2503.14456)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.dims import BP, BPD, BTD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers, multihead, projections
from based_jax.nn.mixer import Buffer, Operation, check_sizes
from based_jax.nn.rwkv import HeadNorm, LoRA, TimeMix, mix_parameter
from based_jax.ops.decays import initial_state
from based_jax.ops.delta_rule import DPLR_IMPLEMENTATIONS, dplr, dplr_step
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS as MATRIX_STATE_STEPS
from based_jax.ops.token_shift import token_shift

RANK_OPTIONS = ("decay_low_rank_dim", "gate_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim")


@dataclasses.dataclass(frozen=True)
class RWKV7Config:
    """Channels of a head, ranks of the small projections, and whether values may lean on the first layer's."""

    head_dim: int = 64
    decay_low_rank_dim: int = 64
    gate_low_rank_dim: int = 128
    a_low_rank_dim: int = 64
    v_low_rank_dim: int = 16
    value_residual: bool = False
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, head_dim=1, **dict.fromkeys(RANK_OPTIONS, 1))


class RWKV7(TimeMix):
    """S = diag(w) S + (kk a)(-kk^T S) + k v^T, o = r^T S; group norm, bonus of the token itself, gate (section 4).

    kk are removal keys of length 1, a rates, log w = -exp(-1/2) sigmoid(...). Values lean on those of the first layer
    only where the caller passes `v_first`; a language model here passes none, as in zoology.

    Source: fla-org/flash-linear-attention:fla/layers/rwkv7.py, `RWKV7Attention`; zoology:zoology/mixers/rwkv7.py.
    """

    Config: ClassVar = RWKV7Config
    IMPLEMENTATIONS: ClassVar = DPLR_IMPLEMENTATIONS
    operation: ClassVar = Operation(dplr, dplr_step, MATRIX_STATE_STEPS)
    _SHARED: ClassVar = {
        "out_proj/kernel": "o_proj.weight",
        **{f"{n}_proj/kernel": f"{n}_proj.weight" for n in "rkv"},
        **{f"{n}_lora/down/kernel": f"{n}_lora.lora.0.weight" for n in "wagv"},
        **{f"{n}_lora/up/kernel": f"{n}_lora.lora.2.weight" for n in "wagv"},
        **{f"{n}_lora/up/bias": f"{n}_lora.lora.2.bias" for n in "wav"},
        **{n: n for n in ("k_k", "k_a", "r_k")},
        "norm/scale": "g_norm.weight",
        "norm/bias": "g_norm.bias",
    }
    REFERENCE: ClassVar = {
        "fla": {**_SHARED, "mix": ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")},
        "zoology": {**_SHARED, "mix": "x_x"},
    }

    def __init__(self, d_model: int, config: RWKV7Config, init: layers.Init):
        if d_model % config.head_dim:
            raise UserError(f"head_dim {config.head_dim} does not divide d_model {d_model}.")
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.num_heads = d_model // config.head_dim
        self.r_proj, self.k_proj, self.v_proj = (
            layers.linear(d_model, d_model, ("embed", "heads"), init) for _ in "rkv"
        )
        self.mix = mix_parameter(6, d_model)
        decay, gate, rate, value = (getattr(config, name) for name in RANK_OPTIONS)
        self.w_lora = LoRA(d_model, decay, d_model, jnp.tanh, init, bias=True)
        self.a_lora = LoRA(d_model, rate, d_model, jax.nn.identity, init, bias=True)
        self.g_lora = LoRA(d_model, gate, d_model, jax.nn.sigmoid, init, bias=False)
        if config.value_residual:
            self.v_lora = LoRA(d_model, value, d_model, jax.nn.identity, init, bias=True)
        self.k_k = nnx.Param(jnp.full(d_model, 0.85), **layers.logical_axes("heads"))
        self.k_a = nnx.Param(jnp.ones(d_model), **layers.logical_axes("heads"))
        self.r_k = nnx.Param(jnp.zeros((self.num_heads, config.head_dim)), **layers.logical_axes("heads", None))
        self.norm = HeadNorm(d_model, config.head_dim * init.norm_eps, rngs=init.rngs)
        self.out_proj = layers.linear(d_model, d_model, ("heads", "embed"), init.out)

    @override
    def __call__(
        self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None, *, v_first: BTD | None = None
    ) -> BPD:
        """Mix a whole sequence; `v_first` (B, T, D) are the first layer's values, for `value_residual`."""
        if v_first is None:
            return super().__call__(x, segment_ids, positions)
        if not self.config.value_residual:
            raise UserError("v_first was given, but value_residual is False.")
        previous, _ = token_shift(x, segment_ids=segment_ids)
        inputs, rest = self._project(x, previous, v_first)
        o, _ = dplr(*inputs, scale=1.0, segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, o, *rest))

    @override
    def state_size(self, seq_len: int) -> int:
        """Return a square of channels a head, and the last token; equal to the cache's."""
        return self.d_model * (self.config.head_dim + 1)

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return a square of channels a head, as publications count: without the last token."""
        return self.d_model * self.config.head_dim

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the mixes, and writing the state twice and reading it twice."""
        ranks = sum(getattr(self.config, name) for name in RANK_OPTIONS[:3])
        ranks += self.config.v_low_rank_dim if self.config.value_residual else 0
        weights = self.d_model * (4 * self.d_model + 2 * ranks + 7)
        return 2 * weights + 8 * self.d_model * self.config.head_dim

    @override
    def reference_buffers(self) -> Mapping[str, Buffer]:
        """Return the projection that zoology and fla build in all layers but the first, whose values none may read."""
        D, rank = self.d_model, self.config.v_low_rank_dim
        unread = {"v_lora.lora.0.weight": (rank, D), "v_lora.lora.2.weight": (D, rank), "v_lora.lora.2.bias": (D,)}
        return {} if self.config.value_residual else unread

    @override
    def _initial_memory(self, batch):
        return initial_state(batch, self.num_heads, self.config.head_dim, self.config.head_dim)

    @override
    def _options(self) -> dict[str, Any]:
        return {"scale": 1.0}

    @override
    def _project(self, x, previous, v_first=None):
        delta = previous - x
        r, w, k, v, a, g = (x + delta * layers.per_channel(m, x) for m in self.mix[...])
        values = self.v_proj(v)
        if v_first is not None:
            values = values + (v_first - values) * jax.nn.sigmoid(self.v_lora(v)).astype(values.dtype)
        log_decay = -math.exp(-0.5) * jax.nn.sigmoid(self.w_lora(w))
        rate = jax.nn.sigmoid(self.a_lora(a))
        keys = self.k_proj(k).astype(jnp.float32)
        removal = multihead.split_heads(keys * layers.per_channel(self.k_k[...], keys), self.num_heads)
        removal = removal / jnp.sqrt(jnp.maximum(jnp.sum(removal * removal, axis=-1, keepdims=True), 1e-24))
        keys = keys + keys * (rate - 1) * layers.per_channel(self.k_a[...], keys)
        r, keys, values, log_decay, rate = (
            multihead.split_heads(y, self.num_heads) for y in (self.r_proj(r), keys, values, log_decay, rate)
        )
        inputs = (r, keys.astype(values.dtype), values, log_decay, -removal, removal * rate)
        similarity = jnp.sum(r.astype(jnp.float32) * keys * layers.per_channel(self.r_k[...], keys), axis=-1)
        bonus = multihead.merge_heads((similarity[..., None] * values).astype(jnp.float32))
        return inputs, (bonus, self.g_lora(g))

    @override
    def _out(self, o, bonus, gate):
        return projections.into_stream(self.out_proj, ((self.norm(o) + bonus) * gate).astype(self.dtype))

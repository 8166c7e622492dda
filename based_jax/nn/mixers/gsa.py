"""Gated slot attention: a softmax over slots of bounded memory (arXiv 2409.07146)."""

import dataclasses
from typing import ClassVar, override

import jax
import jax.numpy as jnp

from based_jax.config import added_later
from based_jax.errors import unknown
from based_jax.nn import layers, multihead
from based_jax.nn.gated import GatedLinearMixer, GatedState, ProjectedHeads, check_kv_heads, expanded
from based_jax.nn.mixer import Operation, check_positive, check_sizes
from based_jax.ops import gated_slot_attention as slots
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS as MATRIX_STATE_STEPS

FEATURE_MAPS = {"swish": jax.nn.silu, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class GSAConfig:
    """Heads, widths as multiples of D, slots of a head, taps (0: no convolution), and the decay's temperature.

    Each of `num_kv_heads` keys, values and decays, as many as queries where None, serves as many queries. Queries and
    keys go through the map `feature_map` of `FEATURE_MAPS`.
    """

    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    num_slots: int = 64
    conv_size: int = 0
    gate_logit_normalizer: float = 8.0
    impl: str = "auto"
    num_kv_heads: int | None = added_later(None)
    feature_map: str = added_later("swish")

    def __post_init__(self):
        check_sizes(self, num_heads=1, num_slots=1, conv_size=0)
        check_positive(self, "expand_k", "expand_v", "gate_logit_normalizer")
        check_kv_heads(self)
        if self.feature_map not in FEATURE_MAPS:
            raise unknown("feature map", self.feature_map, FEATURE_MAPS)


class GSA(GatedLinearMixer):
    """log a = log sigmoid(W x) / 8 and s = 1 - a by slot; SiLU on queries, keys, values and output (section 3.2).

    Source: fla-org/flash-linear-attention:fla/layers/gsa.py, `GatedSlotAttention`.
    """

    Config: ClassVar = GSAConfig
    IMPLEMENTATIONS: ClassVar = slots.IMPLEMENTATIONS
    operation: ClassVar = Operation(slots.gated_slot_attention, slots.gated_slot_attention_step, MATRIX_STATE_STEPS)
    scale: ClassVar = 1.0
    gate_activation: ClassVar = None
    norm_over_heads: ClassVar = True
    REFERENCE: ClassVar = {
        "fla": {
            "out_proj/kernel": "o_proj.weight",
            "qkv/kernel": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
            "conv_kernel": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
            "decay/kernel": "f_proj.weight",
            "norm/scale": "g_norm.weight",
        }
    }

    def __init__(self, d_model: int, config: GSAConfig, init: layers.Init):
        value_dim = expanded("expand_v", d_model, config.expand_v, config.num_heads)
        super().__init__(
            d_model,
            config,
            init,
            num_heads=config.num_heads,
            key_dim=expanded("expand_k", d_model, config.expand_k, config.num_heads),
            value_dim=value_dim,
            conv_size=config.conv_size,
            projected=ProjectedHeads.grouped_keys(config.num_heads, config.num_kv_heads),
        )
        decays = self.projected.keys * config.num_slots
        self.decay = layers.linear(d_model, decays, ("embed", "heads"), init.fp32)

    @override
    def _initial_state(self, batch: int, max_len: int) -> GatedState:
        """Return the state with empty slots."""
        H = self.num_heads
        memory = slots.initial_state(batch, H, self.key_dim // H, self.config.num_slots, self.value_dim // H)
        return super()._initial_state(batch, max_len)._replace(memory=memory)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return a key and a value for each slot of each head, and the convolution's inputs; equal to the cache's."""
        return self.config.num_slots * (self.key_dim + self.value_dim) + self.conv_size * sum(self.widths)

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return a key and a value for each slot of each head, as publications count: without the convolution."""
        return self.config.num_slots * (self.key_dim + self.value_dim)

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the taps, and writing and reading the slots once."""
        own = 4 * self.key_dim * self.value_dim // self.num_heads
        slot_flops = 4 * self.config.num_slots * (self.key_dim + self.value_dim)
        return super().flops_per_token(seq_len) - own + slot_flops

    @override
    def _gated(self, x, q, k, v):
        log_decay = jax.nn.log_sigmoid(self.decay(x)) / self.config.gate_logit_normalizer
        log_decay = self._for_all_heads(multihead.split_heads(log_decay, self.projected.keys))
        q, k = (FEATURE_MAPS[self.config.feature_map](y) for y in (q, k))
        return q, k, jax.nn.silu(v), -jnp.expm1(log_decay), log_decay

    @override
    def _gate_weights(self) -> int:
        return self.d_model * self.projected.keys * self.config.num_slots

    @override
    def _out(self, x, o, gate=None):
        return super()._out(x, jax.nn.silu(o), gate)

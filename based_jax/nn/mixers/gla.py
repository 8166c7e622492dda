"""Gated linear attention: a decay for each key channel, from the input through a low rank (arXiv 2312.06635)."""

import dataclasses
from typing import ClassVar, override

import jax

from based_jax.nn import layers, multihead
from based_jax.nn.gated import GatedLinearMixer, expanded
from based_jax.nn.mixer import check_positive, check_sizes


@dataclasses.dataclass(frozen=True)
class GLAConfig:
    """Heads, widths as multiples of D, taps of a short convolution (0: none), and the decay's rank and temperature."""

    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    conv_size: int = 0
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16.0
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, num_heads=1, conv_size=0, gate_low_rank_dim=1)
        check_positive(self, "expand_k", "expand_v", "gate_logit_normalizer")


class GLA(GatedLinearMixer):
    """log a = log sigmoid(W2 W1 x + b) / 16, RMSNorm by head, SiLU gate (section 4.4).

    Source: HazyResearch/zoology:zoology/mixers/gla.py, `GatedLinearAttention`.
    """

    Config: ClassVar = GLAConfig
    REFERENCE: ClassVar = {
        "zoology": {
            "out_proj/kernel": "o_proj.weight",
            "qkv/kernel": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
            "conv_kernel": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
            "gate/kernel": "g_proj.weight",
            "decay_down/kernel": "gk_proj.0.weight",
            "decay_up/kernel": "gk_proj.1.weight",
            "decay_up/bias": "gk_proj.1.bias",
            "norm/scale": "g_norm_swish_gate.weight",
        }
    }

    def __init__(self, d_model: int, config: GLAConfig, init: layers.Init):
        super().__init__(
            d_model,
            config,
            init,
            num_heads=config.num_heads,
            key_dim=expanded("expand_k", d_model, config.expand_k, config.num_heads),
            value_dim=expanded("expand_v", d_model, config.expand_v, config.num_heads),
            conv_size=config.conv_size,
        )
        rank = config.gate_low_rank_dim
        self.decay_down = layers.linear(d_model, rank, ("embed", None), init.fp32)
        self.decay_up = layers.linear(rank, self.key_dim, (None, "heads"), init.fp32, bias=True)

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return `state_size`: in zoology, GLA alone counts the inputs of its short convolution."""
        return self.state_size(seq_len)

    @override
    def _gated(self, x, q, k, v):
        logits = self.decay_up(self.decay_down(x))
        log_decay = jax.nn.log_sigmoid(logits) / self.config.gate_logit_normalizer
        return q, k, v, multihead.split_heads(log_decay, self.num_heads)

    @override
    def _gate_weights(self) -> int:
        return self.config.gate_low_rank_dim * (self.d_model + self.key_dim)

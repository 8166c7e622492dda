"""Gated linear attention with one data-dependent decay a head (as in arXiv 2405.21060 and 2103.02143)."""

import dataclasses
from typing import ClassVar, override

import jax

from based_jax.config import added_later
from based_jax.nn import layers
from based_jax.nn.gated import GatedLinearMixer, ProjectedHeads, check_kv_heads, expanded
from based_jax.nn.mixer import check_positive, check_sizes


@dataclasses.dataclass(frozen=True)
class SimpleGLAConfig:
    """Heads, widths as multiples of D, taps of the short convolution (0: none), and the decay's temperature.

    Each of `num_kv_heads` keys and values, as many as queries where None, serves as many queries.
    """

    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: int = 4
    gate_logit_normalizer: float = 16.0
    impl: str = "auto"
    num_kv_heads: int | None = added_later(None)

    def __post_init__(self):
        check_sizes(self, num_heads=1, conv_size=0)
        check_kv_heads(self)
        check_positive(self, "expand_k", "expand_v", "gate_logit_normalizer")


class SimpleGLA(GatedLinearMixer):
    """log a = log sigmoid(W x + b) / 16 by head, short convolutions, RMSNorm by head, SiLU gate.

    Source: fla-org/flash-linear-attention:fla/layers/simple_gla.py, `SimpleGatedLinearAttention`.
    """

    Config: ClassVar = SimpleGLAConfig
    REFERENCE: ClassVar = {
        "fla": {
            "out_proj/kernel": "o_proj.weight",
            "qkv/kernel": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
            "conv_kernel": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
            "gate/kernel": "g_proj.weight",
            "decay/kernel": "gk_proj.weight",
            "decay/bias": "gk_proj.bias",
            "norm/scale": "g_norm_swish_gate.weight",
        }
    }

    def __init__(self, d_model: int, config: SimpleGLAConfig, init: layers.Init):
        super().__init__(
            d_model,
            config,
            init,
            num_heads=config.num_heads,
            key_dim=expanded("expand_k", d_model, config.expand_k, config.num_heads),
            value_dim=expanded("expand_v", d_model, config.expand_v, config.num_heads),
            conv_size=config.conv_size,
            projected=ProjectedHeads.grouped_keys(config.num_heads, config.num_kv_heads),
        )
        self.decay = layers.linear(d_model, config.num_heads, ("embed", "heads"), init.fp32, bias=True)

    @override
    def _gated(self, x, q, k, v):
        log_decay = jax.nn.log_sigmoid(self.decay(x)) / self.config.gate_logit_normalizer
        return q, k, v, log_decay[..., None]

    @override
    def _gate_weights(self) -> int:
        return self.d_model * self.num_heads

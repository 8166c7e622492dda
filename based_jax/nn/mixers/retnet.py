"""Multi-scale retention: linear attention with one constant decay a head (RetNet, arXiv 2307.08621, section 2)."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp

from based_jax.config import added_later
from based_jax.nn import layers
from based_jax.nn.gated import GatedLinearMixer, ProjectedHeads, check_kv_heads, constant_decay, expanded
from based_jax.nn.mixer import check_positive, check_sizes


@dataclasses.dataclass(frozen=True)
class RetNetConfig:
    """Heads, the widths of queries and of values as multiples of D, and taps of a short convolution (0: none).

    Each of `num_kv_heads` keys and values, as many as queries where None, serves as many queries.
    """

    num_heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 2.0
    impl: str = "auto"
    num_kv_heads: int | None = added_later(None)
    conv_size: int = added_later(0)

    def __post_init__(self):
        check_sizes(self, num_heads=1, conv_size=0)
        check_kv_heads(self)
        check_positive(self, "expand_k", "expand_v")


class RetNet(GatedLinearMixer):
    """Decay 1 - 2^(-5-h), rotary queries and keys, RMSNorm by head, SiLU gate (equations 5 to 8).

    RMSNorm in place of the paper's group norm, as in the source; rotary stands for its complex decay (equation 5).
    Source: fla-org/flash-linear-attention:fla/layers/multiscale_retention.py, `MultiScaleRetention`.
    """

    Config: ClassVar = RetNetConfig
    rotary: ClassVar = True
    REFERENCE: ClassVar = {
        "fla": {
            "out_proj/kernel": "o_proj.weight",
            "qkv/kernel": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
            "conv_kernel": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
            "gate/kernel": "g_proj.weight",
            "norm/scale": "g_norm_swish_gate.weight",
        }
    }

    def __init__(self, d_model: int, config: RetNetConfig, init: layers.Init):
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

    @override
    def _gated(self, x, q, k, v):
        return q, k, v, constant_decay(x, jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.num_heads)))))

"""Multi-scale retention: linear attention with one constant decay a head (RetNet, arXiv 2307.08621, section 2)."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp

from based_jax.nn import layers
from based_jax.nn.gated import GatedLinearMixer, constant_decay, expanded
from based_jax.nn.mixer import check_positive, check_sizes


@dataclasses.dataclass(frozen=True)
class RetNetConfig:
    """Heads, and the widths of queries and of values as multiples of D."""

    num_heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 2.0
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, num_heads=1)
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
        )

    @override
    def _gated(self, x, q, k, v):
        return q, k, v, constant_decay(x, jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.num_heads)))))

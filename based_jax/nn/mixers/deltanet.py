"""DeltaNet: linear attention that overwrites what its state holds under a key (arXiv 2406.06484)."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp

from based_jax.config import added_later
from based_jax.nn import layers
from based_jax.nn.gated import delta_rate, expanded
from based_jax.nn.mixer import check_positive, check_sizes
from based_jax.nn.unit_delta import UnitDeltaMixer


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
    """Heads, widths of queries and values as multiples of D, and taps of the short convolution (0: none).

    `allow_neg_eigval` doubles the rates, which are below 2 then (arXiv 2411.12537).
    """

    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: int = 4
    impl: str = "auto"
    allow_neg_eigval: bool = added_later(False)

    def __post_init__(self):
        check_sizes(self, num_heads=1, conv_size=0)
        check_positive(self, "expand_k", "expand_v")


class DeltaNet(UnitDeltaMixer):
    """S += beta k (v - S^T k)^T with unit queries and keys, beta = sigmoid(W x), RMSNorm by head (section 3.3).

    Source: HazyResearch/zoology:zoology/mixers/delta_net.py, `DeltaNet`, without its casts to bf16.
    """

    Config: ClassVar = DeltaNetConfig
    gate_activation: ClassVar = None
    REFERENCE: ClassVar = {
        "zoology": {
            "out_proj/kernel": "o_proj.weight",
            "qkv/kernel": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
            "conv_kernel": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
            "rate/kernel": "b_proj.weight",
            "norm/scale": "o_norm.weight",
        }
    }

    def __init__(self, d_model: int, config: DeltaNetConfig, init: layers.Init):
        super().__init__(
            d_model,
            config,
            init,
            num_heads=config.num_heads,
            key_dim=expanded("expand_k", d_model, config.expand_k, config.num_heads),
            value_dim=expanded("expand_v", d_model, config.expand_v, config.num_heads),
            conv_size=config.conv_size,
        )
        self.rate = layers.linear(d_model, config.num_heads, ("embed", "heads"), init.fp32)

    @override
    def _transition(self, x):
        beta = delta_rate(self.rate(x), self.config.allow_neg_eigval)
        return jnp.zeros((*beta.shape, 1)), beta

    @override
    def _gate_weights(self) -> int:
        return self.d_model * self.num_heads

"""Lightning attention: linear attention whose heads forget at fixed rates (arXiv 2401.04658; MiniMax-01)."""

import dataclasses
from typing import ClassVar, override

import jax
import jax.numpy as jnp

from based_jax.nn import layers, multihead
from based_jax.nn.gated import GatedLinearMixer, constant_decay, head_slopes
from based_jax.nn.mixer import check_sizes


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """Heads."""

    num_heads: int = 8
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, num_heads=1)


class LightningAttention(GatedLinearMixer):
    """SiLU on queries, keys and values, decay exp(-slope), RMSNorm over all heads, sigmoid gate; no scale.

    The slopes are ALiBi's, 2^(-8h/H). The publications shrink them with depth, which a mixer does not know; ours are
    those of the first layer.
    Source: OpenNLPLab/lightning-attention:lightning_attn/ops; the layer as in arXiv 2501.08313, section 2.2.
    """

    Config: ClassVar = LightningConfig
    scale: ClassVar = 1.0
    gate_activation: ClassVar = staticmethod(jax.nn.sigmoid)
    norm_over_heads: ClassVar = True

    def __init__(self, d_model: int, config: LightningConfig, init: layers.Init):
        multihead.head_dim(d_model, config.num_heads)
        super().__init__(
            d_model,
            config,
            init,
            num_heads=config.num_heads,
            key_dim=d_model,
            value_dim=d_model,
        )

    @override
    def _gated(self, x, q, k, v):
        q, k, v = (jax.nn.silu(y) for y in (q, k, v))
        return q, k, v, constant_decay(x, -jnp.asarray(head_slopes(self.num_heads), jnp.float32))

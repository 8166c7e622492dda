"""RWKV-7's channel mixing, which stands where other models have an MLP (arXiv 2503.14456, equation 22)."""

import dataclasses
from typing import ClassVar, override

import jax

from based_jax.nn import layers
from based_jax.nn.mixer import check_positive
from based_jax.nn.rwkv import ChannelMix, mix_parameter


@dataclasses.dataclass(frozen=True)
class RWKV7ChannelMixConfig:
    """Hidden width as a multiple of D."""

    expand: float = 4.0

    def __post_init__(self):
        check_positive(self, "expand")


class RWKV7ChannelMix(ChannelMix):
    """y = W_v relu(W_k (x + (x_{t-1} - x) mix))^2.

    A model alternates it with `rwkv7` in its layer list, with mlp "none".
    Source: fla-org/flash-linear-attention:fla/ops/rwkv7/channel_mixing.py.
    """

    Config: ClassVar = RWKV7ChannelMixConfig

    def __init__(self, d_model: int, config: RWKV7ChannelMixConfig, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.hidden = layers.scaled("expand", d_model, config.expand)
        self.key = layers.linear(d_model, self.hidden, ("embed", "mlp"), init)
        self.value = layers.linear(self.hidden, d_model, ("mlp", "embed"), init.out)
        self.mix = mix_parameter(1, d_model)

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections and the mix."""
        return 2 * self.d_model * (2 * self.hidden + 1)

    @override
    def _mix(self, x, previous):
        k = x + (previous - x) * layers.per_channel(self.mix[0], x)
        return self.value(jax.nn.relu(self.key(k)) ** 2)

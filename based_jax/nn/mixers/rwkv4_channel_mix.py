"""RWKV-4's channel mixing, which stands where other models have an MLP (arXiv 2305.13048, equations 17 and 18)."""

import dataclasses
from typing import ClassVar, override

import jax

from based_jax.nn import layers
from based_jax.nn.mixer import check_positive
from based_jax.nn.rwkv import ChannelMix, mix_parameter, mixed


@dataclasses.dataclass(frozen=True)
class RWKV4ChannelMixConfig:
    """Hidden width as a multiple of D."""

    expand: float = 4.0

    def __post_init__(self):
        check_positive(self, "expand")


class RWKV4ChannelMix(ChannelMix):
    """y = sigmoid(W_r r) W_v relu(W_k k)^2, r and k mixes of a token and the one before.

    A model alternates it with `rwkv4` in its layer list, with mlp "none".
    Source: transformers:models/rwkv/modeling_rwkv.py, `RwkvFeedForward`.
    """

    Config: ClassVar = RWKV4ChannelMixConfig
    REFERENCE: ClassVar = {
        "rwkv4": {
            "value/kernel": "value.weight",
            "key/kernel": "key.weight",
            "receptance/kernel": "receptance.weight",
            "mix": ("time_mix_key", "time_mix_receptance"),
        }
    }

    def __init__(self, d_model: int, config: RWKV4ChannelMixConfig, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.hidden = layers.scaled("expand", d_model, config.expand)
        self.key = layers.linear(d_model, self.hidden, ("embed", "mlp"), init)
        self.receptance = layers.linear(d_model, d_model, ("embed", "mlp"), init)
        self.value = layers.linear(self.hidden, d_model, ("mlp", "embed"), init.out)
        self.mix = mix_parameter(2, d_model)

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections and the mixes."""
        return 2 * self.d_model * (2 * self.hidden + self.d_model + 2)

    @override
    def _mix(self, x, previous):
        k, r = mixed(x, previous, self.mix[...])
        return jax.nn.sigmoid(self.receptance(r)) * self.value(jax.nn.relu(self.key(k)) ** 2)

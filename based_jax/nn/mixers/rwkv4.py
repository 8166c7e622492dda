"""RWKV-4's time mixing: an average of values by keys and their age (arXiv 2305.13048)."""

import dataclasses
from typing import ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.config import added_later
from based_jax.nn import layers, projections
from based_jax.nn.mixer import Operation, check_sizes
from based_jax.nn.rwkv import TimeMix, mix_parameter, mixed
from based_jax.ops.wkv4 import IMPLEMENTATIONS, initial_state, wkv4, wkv4_step


@dataclasses.dataclass(frozen=True)
class RWKV4Config:
    """Width of the average, 0 for D, of which every channel is a head."""

    impl: str = "auto"
    attention_dim: int = added_later(0)

    def __post_init__(self):
        check_sizes(self, attention_dim=0)


class RWKV4(TimeMix):
    """y = W_o (sigmoid(r) wkv(k, v)); r, k, v are projections of mixes of a token and the one before (section 3).

    The initial decays and shares are even; the publication spreads them by layer, which a mixer does not know.
    Source: transformers:models/rwkv/modeling_rwkv.py, `RwkvSelfAttention`.
    """

    Config: ClassVar = RWKV4Config
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    operation: ClassVar = Operation(wkv4, wkv4_step)
    REFERENCE: ClassVar = {
        "rwkv4": {
            "out_proj/kernel": "output.weight",
            "key/kernel": "key.weight",
            "value/kernel": "value.weight",
            "receptance/kernel": "receptance.weight",
            "mix": ("time_mix_key", "time_mix_value", "time_mix_receptance"),
            "time_decay": "time_decay",
            "time_first": "time_first",
        }
    }

    def __init__(self, d_model: int, config: RWKV4Config, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.inner_dim = config.attention_dim or d_model
        self.key, self.value, self.receptance = (
            layers.linear(d_model, self.inner_dim, ("embed", "heads"), init) for _ in "kvr"
        )
        self.mix = mix_parameter(3, d_model)
        self.time_decay = nnx.Param(jnp.linspace(-5.0, 3.0, self.inner_dim), **layers.logical_axes("heads"))
        self.time_first = nnx.Param(jnp.full(self.inner_dim, jnp.log(0.3)), **layers.logical_axes("heads"))
        self.out_proj = layers.linear(self.inner_dim, d_model, ("heads", "embed"), init.out)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return numerator, denominator and maximum of each channel, and the last token; equal to the cache's."""
        return 3 * self.inner_dim + self.d_model

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return numerator, denominator and maximum of each channel, as publications count: without the last token."""
        return 3 * self.inner_dim

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the mixes, and about 10 operations a channel."""
        return 8 * self.d_model * self.inner_dim + 6 * self.d_model + 10 * self.inner_dim

    @override
    def _initial_memory(self, batch):
        return initial_state(batch, self.inner_dim)

    @override
    def _project(self, x, previous):
        k, v, r = mixed(x, previous, self.mix[...])
        decay = -jnp.exp(self.time_decay[...].astype(jnp.float32))
        return (self.key(k), self.value(v), decay, self.time_first[...]), (self.receptance(r),)

    @override
    def _out(self, o, receptance):
        return projections.into_stream(self.out_proj, jax.nn.sigmoid(receptance) * o)

"""Kimi delta attention: the delta rule on a state that each key channel forgets at its own rate (arXiv 2510.26692)."""

import dataclasses
import math
from typing import ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.config import added_later
from based_jax.errors import UserError
from based_jax.nn import layers, multihead
from based_jax.nn.gated import (
    ProjectedHeads,
    bounded_decay,
    check_v_heads,
    delta_rate,
    inverse_softplus_dt,
    softplus_decay,
)
from based_jax.nn.mixer import check_positive, check_sizes
from based_jax.nn.unit_delta import UnitDeltaMixer


@dataclasses.dataclass(frozen=True)
class KDAConfig:
    """Heads, key channels of a head, value channels as a multiple of them, taps (0: none), a bound on the log-decay.

    Each of `num_heads` queries and keys serves as many of `num_v_heads` values, one where None. `allow_neg_eigval`
    doubles the rates, which are below 2 then (arXiv 2411.12537).
    """

    num_heads: int = 8
    head_dim: int = 128
    expand_v: float = 1.0
    conv_size: int = 4
    lower_bound: float | None = None
    impl: str = "auto"
    num_v_heads: int | None = added_later(None)
    allow_neg_eigval: bool = added_later(False)

    def __post_init__(self):
        check_sizes(self, num_heads=1, head_dim=1, conv_size=0)
        check_v_heads(self)
        check_positive(self, "expand_v")
        if self.lower_bound is not None and not -math.inf < self.lower_bound < 0:
            raise UserError(f"lower_bound is {self.lower_bound}; it is below 0, or None.")


class KDA(UnitDeltaMixer):
    """log a = -exp(A_log) softplus(W2 W1 x + dt_bias) by channel, delta rule, low-rank sigmoid gate (section 3).

    With a `lower_bound` L < 0, log a = L sigmoid(exp(A_log) (W2 W1 x + dt_bias)) instead.

    Source: fla-org/flash-linear-attention:fla/layers/kda.py, `KimiDeltaAttention`.
    """

    Config: ClassVar = KDAConfig
    gate_activation: ClassVar = staticmethod(jax.nn.sigmoid)
    REFERENCE: ClassVar = {
        "fla": {
            "out_proj/kernel": "o_proj.weight",
            "qkv/kernel": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
            "conv_kernel": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
            "gate_down/kernel": "g_proj.0.weight",
            "gate_up/kernel": "g_proj.1.weight",
            "gate_up/bias": "g_proj.1.bias",
            "decay_down/kernel": "f_proj.0.weight",
            "decay_up/kernel": "f_proj.1.weight",
            "rate/kernel": "b_proj.weight",
            "A_log": "A_log",
            "dt_bias": "dt_bias",
            "norm/scale": "o_norm.weight",
        }
    }

    def __init__(self, d_model: int, config: KDAConfig, init: layers.Init):
        projected = ProjectedHeads.grouped_values(config.num_heads, config.num_v_heads)
        K, H = config.head_dim, projected.values
        V = layers.scaled("expand_v", K, config.expand_v)
        super().__init__(
            d_model,
            config,
            init,
            num_heads=H,
            key_dim=H * K,
            value_dim=H * V,
            conv_size=config.conv_size,
            gate_rank=V,
            projected=projected,
        )
        self.decay_down = layers.linear(d_model, V, ("embed", None), init.fp32)
        self.decay_up = layers.linear(V, H * K, (None, "heads"), init.fp32)
        self.rate = layers.linear(d_model, H, ("embed", "heads"), init.fp32)
        A = jax.random.uniform(init.rngs.params(), (H,), minval=1.0, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(A), **layers.logical_axes("heads"))
        self.dt_bias = nnx.Param(inverse_softplus_dt(H * K, init.rngs), **layers.logical_axes("heads"))

    @override
    def _transition(self, x):
        logits, A_log = self.decay_up(self.decay_down(x)), jnp.repeat(self.A_log[...], self.config.head_dim)
        if self.config.lower_bound is None:
            log_decay = softplus_decay(logits, A_log, self.dt_bias[...])
        else:
            log_decay = bounded_decay(logits, A_log, self.dt_bias[...], self.config.lower_bound)
        rate = delta_rate(self.rate(x), self.config.allow_neg_eigval)
        return multihead.split_heads(log_decay, self.num_heads), rate

    @override
    def _gate_weights(self) -> int:
        rank = self.value_dim // self.num_heads
        return self.d_model * (rank + self.num_heads) + rank * self.key_dim

"""Gated DeltaNet: the delta rule on a state that each head forgets at its own rate (arXiv 2412.06464)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.config import added_later
from based_jax.nn import layers
from based_jax.nn.gated import (
    ProjectedHeads,
    check_v_heads,
    delta_rate,
    expanded,
    inverse_softplus_dt,
    softplus_decay,
)
from based_jax.nn.mixer import Buffer, check_positive, check_sizes
from based_jax.nn.unit_delta import UnitDeltaMixer


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Heads, widths of queries and values as multiples of D, taps of the short convolution (0: none), and the gate.

    Each of `num_heads` queries and keys serves as many of `num_v_heads` values, one where None. `allow_neg_eigval`
    doubles the rates, which are below 2 then (arXiv 2411.12537).
    """

    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 2.0
    conv_size: int = 4
    use_gate: bool = added_later(True)
    impl: str = "auto"
    num_v_heads: int | None = added_later(None)
    allow_neg_eigval: bool = added_later(False)

    def __post_init__(self):
        check_sizes(self, num_heads=1, conv_size=0)
        check_v_heads(self)
        check_positive(self, "expand_k", "expand_v")


class GatedDeltaNet(UnitDeltaMixer):
    """S = a S, then the delta rule; log a = -exp(A_log) softplus(W x + dt_bias), SiLU gate (equation 10, section 3.4).

    Without `use_gate` the output is normed alone, as in zoology's MQAR models.

    Source: HazyResearch/zoology:zoology/mixers/gated_delta_net.py, `GatedDeltaNet`, without its casts to bf16.
    """

    Config: ClassVar = GatedDeltaNetConfig
    REFERENCE: ClassVar = {
        "zoology": {
            "out_proj/kernel": "o_proj.weight",
            "qkv/kernel": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
            "conv_kernel": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
            "gate/kernel": "g_proj.weight",
            "rate/kernel": "b_proj.weight",
            "decay/kernel": "a_proj.weight",
            "A_log": "A_log",
            "dt_bias": "dt_bias",
            "norm/scale": "o_norm.weight",
        }
    }

    def __init__(self, d_model: int, config: GatedDeltaNetConfig, init: layers.Init):
        projected = ProjectedHeads.grouped_values(config.num_heads, config.num_v_heads)
        H, keys = projected.values, expanded("expand_k", d_model, config.expand_k, config.num_heads)
        super().__init__(
            d_model,
            config,
            init,
            num_heads=H,
            key_dim=H * keys // config.num_heads,
            value_dim=expanded("expand_v", d_model, config.expand_v, H),
            conv_size=config.conv_size,
            use_gate=config.use_gate,
            projected=projected,
        )
        self.rate, self.decay = (layers.linear(d_model, H, ("embed", "heads"), init.fp32) for _ in range(2))
        A = jax.random.uniform(init.rngs.params(), (H,), minval=1.0, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(A), **layers.logical_axes("heads"))
        self.dt_bias = nnx.Param(inverse_softplus_dt(H, init.rngs), **layers.logical_axes("heads"))

    @override
    def reference_buffers(self) -> Mapping[str, Buffer]:
        return {"D": (self.num_heads,)}

    @override
    def _transition(self, x):
        log_decay = softplus_decay(self.decay(x), self.A_log[...], self.dt_bias[...])
        return log_decay[..., None], delta_rate(self.rate(x), self.config.allow_neg_eigval)

    @override
    def _gate_weights(self) -> int:
        return 2 * self.d_model * self.num_heads

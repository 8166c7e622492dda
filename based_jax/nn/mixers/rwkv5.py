"""RWKV-5 (Eagle): a matrix state for each head, decays that do not depend on the input (arXiv 2404.05892)."""

import dataclasses
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.errors import UserError
from based_jax.nn import layers, multihead, projections
from based_jax.nn.mixer import Operation, check_sizes
from based_jax.nn.rwkv import HeadNorm, TimeMix, mix_parameter, mixed
from based_jax.ops.decays import initial_state
from based_jax.ops.gated_linear_attention import (
    IMPLEMENTATIONS,
    gated_linear_attention,
    gated_linear_attention_step,
)
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS as MATRIX_STATE_STEPS

OUTPUT_DIVISOR = 8  # of the head's output, before its norm


@dataclasses.dataclass(frozen=True)
class RWKV5Config:
    """Channels of a head."""

    head_size: int = 64
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, head_size=1)


class RWKV5(TimeMix):
    """o = r^T (S + diag(u) k v^T), S = diag(w) S + k v^T; y = W_o (group norm(o / 8) SiLU(g)) (equations 5 to 11).

    Source: HazyResearch/zoology:zoology/mixers/rwkv5.py, `RWKVTimeMixer`, without its casts to bf16.
    """

    Config: ClassVar = RWKV5Config
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    operation: ClassVar = Operation(gated_linear_attention, gated_linear_attention_step, MATRIX_STATE_STEPS)
    REFERENCE: ClassVar = {
        "zoology": {
            "out_proj/kernel": "output.weight",
            "receptance/kernel": "receptance.weight",
            "key/kernel": "key.weight",
            "value/kernel": "value.weight",
            "gate/kernel": "gate.weight",
            "mix": ("time_mix_r", "time_mix_k", "time_mix_v", "time_mix_g"),
            "time_decay": "time_decay",
            "bonus": "time_faaaa",
            "norm/scale": "ln_x.weight",
            "norm/bias": "ln_x.bias",
        }
    }

    def __init__(self, d_model: int, config: RWKV5Config, init: layers.Init):
        if d_model % config.head_size:
            raise UserError(f"head_size {config.head_size} does not divide d_model {d_model}.")
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.num_heads = d_model // config.head_size
        self.receptance, self.key, self.value, self.gate = (
            layers.linear(d_model, d_model, ("embed", "heads"), init) for _ in "rkvg"
        )
        self.mix = mix_parameter(4, d_model)
        self.time_decay, self.bonus = (
            nnx.Param(multihead.split_heads(even, self.num_heads), **layers.logical_axes("heads", None))
            for even in (jnp.linspace(-6.0, -1.0, d_model), jnp.linspace(0.0, 0.5, d_model))
        )
        self.norm = HeadNorm(d_model, init.norm_eps, rngs=init.rngs)
        self.out_proj = layers.linear(d_model, d_model, ("heads", "embed"), init.out)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return a square of channels a head, and the last token; equal to the cache's."""
        return self.d_model * (self.config.head_size + 1)

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return a square of channels a head, as publications count: without the last token."""
        return self.d_model * self.config.head_size

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the mixes, and writing and reading the state once."""
        return 10 * self.d_model**2 + 12 * self.d_model + 4 * self.d_model * self.config.head_size

    @override
    def _initial_memory(self, batch):
        return initial_state(batch, self.num_heads, self.config.head_size, self.config.head_size)

    @override
    def _options(self) -> dict[str, Any]:
        return {"bonus": self.bonus[...], "scale": 1.0}

    @override
    def _project(self, x, previous):
        r, k, v, g = mixed(x, previous, self.mix[...])
        projected = self.receptance(r), self.key(k), self.value(v)
        r, k, v = (multihead.split_heads(y, self.num_heads) for y in projected)
        decay = -jnp.exp(self.time_decay[...].astype(jnp.float32))
        return (r, k, v, jnp.broadcast_to(decay, k.shape)), (self.gate(g),)

    @override
    def _out(self, o, gate):
        o = self.norm(o.astype(jnp.float32) / OUTPUT_DIVISOR) * jax.nn.silu(gate.astype(jnp.float32))
        return projections.into_stream(self.out_proj, o.astype(self.dtype))

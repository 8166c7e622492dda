"""RWKV-6 (Finch): RWKV-5 with decays and token shifts that depend on the input (arXiv 2404.05892)."""

import dataclasses
from typing import Any, ClassVar, override

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.nn import layers, multihead, projections
from based_jax.nn.gated import expanded
from based_jax.nn.mixer import Operation, check_positive, check_sizes
from based_jax.nn.rwkv import HeadNorm, LoRA, TimeMix, mix_parameter
from based_jax.ops.decays import initial_state
from based_jax.ops.gated_linear_attention import (
    IMPLEMENTATIONS,
    gated_linear_attention,
    gated_linear_attention_step,
)
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS as MATRIX_STATE_STEPS
from based_jax.ops.precision import EXACT


@dataclasses.dataclass(frozen=True)
class RWKV6Config:
    """Heads, widths of keys and values as multiples of D, and the ranks of the shift and of the decay."""

    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    proj_low_rank_dim: int = 32
    gate_low_rank_dim: int = 64
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, num_heads=1, proj_low_rank_dim=1, gate_low_rank_dim=1)
        check_positive(self, "expand_k", "expand_v")


class RWKV6(TimeMix):
    """Data-dependent token shift (equations 13 to 15), log w = -exp(W2 tanh(W1 x) + b), bonus u, group norm, SiLU gate.

    Source: fla-org/flash-linear-attention:fla/layers/rwkv6.py, `RWKV6Attention`.
    """

    Config: ClassVar = RWKV6Config
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    operation: ClassVar = Operation(gated_linear_attention, gated_linear_attention_step, MATRIX_STATE_STEPS)
    REFERENCE: ClassVar = {
        "fla": {
            "out_proj/kernel": "o_proj.weight",
            "r_proj/kernel": "r_proj.linear.weight",
            "k_proj/kernel": "k_proj.linear.weight",
            "v_proj/kernel": "v_proj.linear.weight",
            "gate/kernel": "g_proj.linear.weight",
            "decay/down/kernel": "w_proj.linear.lora.0.weight",
            "decay/up/kernel": "w_proj.linear.lora.2.weight",
            "decay/up/bias": "w_proj.linear.lora.2.bias",
            "shift_mix": "x_proj.0.mu",
            "shift_down/kernel": "x_proj.0.linear.weight",
            "shift_up/kernel": "x_proj.2.weight",
            "mix": "x_bias",
            "bonus": "bonus",
            "norm/scale": "g_norm.weight",
            "norm/bias": "g_norm.bias",
        }
    }

    def __init__(self, d_model: int, config: RWKV6Config, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        H, rank = config.num_heads, 5 * config.proj_low_rank_dim
        self.key_dim = expanded("expand_k", d_model, config.expand_k, H)
        self.value_dim = expanded("expand_v", d_model, config.expand_v, H)
        self.shift_mix = nnx.Param(jnp.zeros(d_model), **layers.logical_axes("embed"))
        self.shift_down = layers.linear(d_model, rank, ("embed", None), init.fp32)
        self.shift_up = layers.linear(rank, d_model, (None, "embed"), init.fp32)
        self.mix = mix_parameter(5, d_model, 0.0)
        self.r_proj, self.k_proj = (layers.linear(d_model, self.key_dim, ("embed", "heads"), init) for _ in "rk")
        self.v_proj, self.gate = (layers.linear(d_model, self.value_dim, ("embed", "heads"), init) for _ in "vg")
        self.decay = LoRA(d_model, config.gate_low_rank_dim, self.key_dim, jnp.tanh, init, bias=True)
        # as RWKV-5's; at 0 a first token has no output
        bonus = multihead.split_heads(jnp.linspace(0.0, 0.5, self.key_dim), H)
        self.bonus = nnx.Param(bonus, **layers.logical_axes("heads", None))
        self.norm = HeadNorm(self.value_dim, init.norm_eps, rngs=init.rngs)
        self.out_proj = layers.linear(self.value_dim, d_model, ("heads", "embed"), init.out)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return K V elements a head, and the last token; equal to the cache's."""
        return self.key_dim * self.value_dim // self.config.num_heads + self.d_model

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return K V elements a head, as publications count: without the last token."""
        return self.key_dim * self.value_dim // self.config.num_heads

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the mixes, and writing and reading the state once."""
        ranks = 10 * self.config.proj_low_rank_dim + self.config.gate_low_rank_dim
        weights = self.d_model * (2 * self.key_dim + 3 * self.value_dim + ranks + 5)
        weights += self.key_dim * (self.config.gate_low_rank_dim + 1)
        return 2 * weights + 4 * self.key_dim * self.value_dim // self.config.num_heads

    @override
    def _initial_memory(self, batch):
        H = self.config.num_heads
        return initial_state(batch, H, self.key_dim // H, self.value_dim // H)

    @override
    def _options(self) -> dict[str, Any]:
        return {"bonus": self.bonus[...], "scale": 1.0}

    @override
    def _project(self, x, previous):
        x, previous = x.astype(jnp.float32), previous.astype(jnp.float32)
        delta = previous - x
        ranks = jnp.tanh(self.shift_down(x + delta * layers.per_channel(self.shift_mix[...], x)))
        ranks = einops.rearrange(ranks, "... (N R) -> ... N R", N=5)
        up = einops.rearrange(self.shift_up.kernel[...], "(N R) D -> N R D", N=5)
        shares = jnp.einsum("...NR,NRD->N...D", ranks, up, precision=EXACT)
        r, w, k, v, g = (
            x + delta * (share + layers.per_channel(bias, x)) for share, bias in zip(shares, self.mix[...], strict=True)
        )
        r, k, v, decay = (
            multihead.split_heads(y, self.config.num_heads)
            for y in (self.r_proj(r), self.k_proj(k), self.v_proj(v), -jnp.exp(self.decay(w)))
        )
        return (r, k, v, decay), (self.gate(g),)

    @override
    def _out(self, o, gate):
        o = self.norm(o) * jax.nn.silu(gate.astype(jnp.float32))
        return projections.into_stream(self.out_proj, o.astype(self.dtype))

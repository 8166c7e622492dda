"""Mamba: short convolution, selective scan and gate in one layer (arXiv 2312.00752, section 3.4)."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, override

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from based_jax.config import added_later
from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.nn import layers, projections
from based_jax.nn.gated import inverse_softplus_dt
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.ops.calls import BDN
from based_jax.ops.conv import short_conv, short_conv_step
from based_jax.ops.dispatch import beside
from based_jax.ops.gated_norm import gated_skip
from based_jax.ops.gated_scan_step import IMPLEMENTATIONS as STEP_IMPLEMENTATIONS
from based_jax.ops.gated_scan_step import gated_scan_step
from based_jax.ops.projection import multiply
from based_jax.ops.selective_scan import IMPLEMENTATIONS, initial_state, selective_scan

KEYS = {
    "out_proj/kernel": "out_proj.weight",
    "out_proj/bias": "out_proj.bias",
    "in_proj/kernel": "in_proj.weight",
    "in_proj/bias": "in_proj.bias",
    "conv_kernel": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "x_proj/kernel": "x_proj.weight",
    "dt_proj/kernel": "dt_proj.weight",
    "dt_proj/bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
}


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """States of a channel, taps, inner width as a multiple of D, and the rank of dt (0: D/16, rounded up).

    `bias` is whether the projections in and out have biases, `conv_bias` whether the taps have one.
    """

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    impl: str = "auto"
    bias: bool = added_later(False)
    conv_bias: bool = added_later(True)

    def __post_init__(self):
        check_sizes(self, d_state=1, d_conv=1, expand=1, dt_rank=0)


class MambaState(NamedTuple):
    """The inputs of the convolution, and the scan's memory."""

    conv: Float[Array, "B W inner"]
    memory: BDN


class Mamba(Mixer):
    """y = W_o (scan(SiLU(conv(u))) + skip) * SiLU(z), (u, z) = W_i x; dt, B and C from the convolved u.

    `state_size` counts the convolution's inputs too, which the paper's figures leave out.
    Source: HazyResearch/based:based/models/mixers/mamba/modules/mamba_simple.py, `Mamba`.
    """

    Config: ClassVar = MambaConfig
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    REFERENCE: ClassVar = dict.fromkeys(("mamba", "zoology"), KEYS)

    def __init__(self, d_model: int, config: MambaConfig, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.d_inner, self.dt_rank = config.expand * d_model, config.dt_rank or math.ceil(d_model / 16)
        self.in_proj = layers.torch_linear(
            d_model, 2 * self.d_inner, ("embed", "mlp"), init, bias=config.bias, parts=(self.d_inner, self.d_inner)
        )
        self.conv_kernel = layers.conv_parameter((config.d_conv, self.d_inner), config.d_conv, rngs=init.rngs)
        if config.conv_bias:
            self.conv_bias = layers.conv_parameter((self.d_inner,), config.d_conv, rngs=init.rngs)
        widths = (self.dt_rank, config.d_state, config.d_state)
        self.x_proj = layers.torch_linear(self.d_inner, sum(widths), ("mlp", None), init, parts=widths)
        self.dt_proj = layers.torch_linear(self.dt_rank, self.d_inner, (None, "mlp"), init, bias=True)
        self.dt_proj.bias = nnx.Param(inverse_softplus_dt(self.d_inner, init.rngs), **layers.logical_axes("mlp"))
        states = jnp.log(jnp.arange(1, config.d_state + 1, dtype=jnp.float32))
        self.A_log = nnx.Param(
            jnp.array(jnp.broadcast_to(states, (self.d_inner, config.d_state))), **layers.logical_axes("mlp", None)
        )
        self.D = nnx.Param(jnp.ones(self.d_inner), **layers.logical_axes("mlp"))
        self.out_proj = layers.torch_linear(
            self.d_inner, d_model, ("mlp", "embed"), init, bias=config.bias, gain=init.depth_gain
        )

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        u, _ = short_conv(self._inner(x), **self._conv(), segment_ids=segment_ids)
        raw, B, C = self._selected(u)
        y, _ = selective_scan(u, raw, self._A(), B, C, **self._bias(), segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, x, u, y))

    @override
    def _initial_state(self, batch: int, max_len: int) -> MambaState:
        conv = jnp.zeros((batch, self.config.d_conv, self.d_inner), self.dtype)
        return MambaState(conv, initial_state(batch, self.d_inner, self.config.d_state))

    @override
    def _prefill(self, x: BTD, state: MambaState, segment_ids: SegmentIds | None) -> tuple[BTD, MambaState]:
        u, conv = short_conv(self._inner(x), **self._conv(), state=state.conv, segment_ids=segment_ids)
        raw, B, C = self._selected(u)
        options = {"state": state.memory, "segment_ids": segment_ids, "impl": self.config.impl}
        y, memory = selective_scan(u, raw, self._A(), B, C, **self._bias(), **options)
        return self._out(x, u, y), MambaState(conv, memory)

    @override
    def _step(self, x: BD, state: MambaState) -> tuple[BD | projections.Projected, MambaState]:
        joint = self.in_proj(x)
        u, conv = short_conv_step(joint, **self._conv(), state=state.conv)
        low, of_state = projections.narrow_parts(self.x_proj, u, (self.dt_rank, 2 * self.config.d_state))
        raw = multiply(low, self.dt_proj.kernel[...].astype(low.dtype))
        options = self._bias() | {"skip": self.D[...], "impl": beside(self.config.impl, STEP_IMPLEMENTATIONS)}
        y, memory = gated_scan_step(u, raw, self._A(), of_state, joint, state.memory, **options)
        return projections.into_stream(self.out_proj, y), MambaState(conv, memory)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return N states and one input per tap for each inner channel; equal to the cache's."""
        return self.d_inner * (self.config.d_state + self.config.d_conv)

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return N states for each inner channel, as publications count: without the inputs of the convolution."""
        return self.d_inner * self.config.d_state

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the taps, and three operations to write and two to read a state."""
        selection = (self.dt_rank + 2 * self.config.d_state) + self.dt_rank
        weights = self.d_inner * (3 * self.d_model + selection + self.config.d_conv)
        return 2 * weights + 7 * self.d_inner * self.config.d_state

    def _A(self) -> Float[Array, "D N"]:
        return -jnp.exp(self.A_log[...].astype(jnp.float32))

    def _conv(self) -> dict[str, Any]:
        bias = self.conv_bias[...] if self.config.conv_bias else None
        return {"kernel": self.conv_kernel[...], "bias": bias, "silu": True}

    def _selected(self, u):
        """Return the raw steps, and the input and output vectors of the state."""
        low, B, C = jnp.split(self.x_proj(u), [self.dt_rank, self.dt_rank + self.config.d_state], axis=-1)
        return multiply(low, self.dt_proj.kernel[...].astype(low.dtype)), B, C

    def _bias(self) -> dict[str, Any]:
        bias: Any = self.dt_proj.bias
        return {"bias": bias[...]}

    def _inner(self, x):
        return projections.linear_part(self.in_proj, x, 0, self.d_inner)

    def _out(self, x, u, y):
        return self._gated(projections.linear_part(self.in_proj, x, self.d_inner, 2 * self.d_inner), u, y)

    def _gated(self, z, u, y):
        return projections.into_stream(self.out_proj, gated_skip(y, u, z, self.D[...]))

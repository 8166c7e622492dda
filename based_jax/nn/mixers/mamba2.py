"""Mamba-2: Mamba's layer with one decay a head, so that its scan is linear attention (SSD, arXiv 2405.21060)."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from based_jax.config import added_later
from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers, multihead, projections
from based_jax.nn.gated import inverse_softplus_dt
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.ops.conv import short_conv, short_conv_step
from based_jax.ops.decays import initial_state
from based_jax.ops.dispatch import beside
from based_jax.ops.gated_norm import gated_rms_norm
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS as MATRIX_STATE_STEPS
from based_jax.ops.ssd import BHNP, IMPLEMENTATIONS, ssd, ssd_step


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """States N, taps, inner width as a multiple of D, channels P of a head, and groups of heads that share B and C.

    `bias` is whether the projections in and out have biases, `conv_bias` whether the taps have one.
    """

    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    impl: str = "auto"
    bias: bool = added_later(False)
    conv_bias: bool = added_later(True)

    def __post_init__(self):
        check_sizes(self, d_state=1, d_conv=1, expand=1, headdim=1, ngroups=1)


class Mamba2State(NamedTuple):
    """The inputs of the convolution over x, B and C, and the scan's memory (B, H, N, P)."""

    conv: Float[Array, "B W channels"]
    memory: BHNP


class Mamba2(Mixer):
    """S_t = exp(dt A) S_{t-1} + B_t (dt x_t)^T, y_t = C_t^T S_t + D x_t, RMSNorm of y SiLU(z) (sections 6 and 7).

    Source: HazyResearch/zoology:zoology/mixers/mamba2.py, `Mamba2`.
    """

    Config: ClassVar = Mamba2Config
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    REFERENCE: ClassVar = {
        "zoology": {
            "out_proj/kernel": "out_proj.weight",
            "out_proj/bias": "out_proj.bias",
            "in_proj/kernel": "in_proj.weight",
            "in_proj/bias": "in_proj.bias",
            "conv_kernel": "conv1d.weight",
            "conv_bias": "conv1d.bias",
            "dt_bias": "dt_bias",
            "A_log": "A_log",
            "D": "D",
            "norm/scale": "norm.weight",
        }
    }

    def __init__(self, d_model: int, config: Mamba2Config, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.d_inner = config.expand * d_model
        if self.d_inner % config.headdim or (self.d_inner // config.headdim) % config.ngroups:
            raise UserError(
                f"The inner width {self.d_inner} cannot be divided into heads of headdim {config.headdim} in"
                f" {config.ngroups} groups."
            )
        self.num_heads = self.d_inner // config.headdim
        states = config.ngroups * config.d_state
        self.channels = self.d_inner + 2 * states
        widths = (self.d_inner, self.d_inner, states, states, self.num_heads)
        self.in_proj = layers.torch_linear(d_model, sum(widths), ("embed", "mlp"), init, bias=config.bias, parts=widths)
        self.conv_kernel = layers.conv_parameter((config.d_conv, self.channels), config.d_conv, rngs=init.rngs)
        if config.conv_bias:
            self.conv_bias = layers.conv_parameter((self.channels,), config.d_conv, rngs=init.rngs)
        self.dt_bias = nnx.Param(inverse_softplus_dt(self.num_heads, init.rngs), **layers.logical_axes("heads"))
        A = jax.random.uniform(init.rngs.params(), (self.num_heads,), minval=1.0, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(A), **layers.logical_axes("heads"))
        self.D = nnx.Param(jnp.ones(self.num_heads), **layers.logical_axes("heads"))
        self.norm = layers.rms_norm(self.d_inner, init.norm_eps, rngs=init.rngs)
        self.out_proj = layers.torch_linear(
            self.d_inner, d_model, ("mlp", "embed"), init, bias=config.bias, gain=init.depth_gain
        )

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        *parts, dt = self._projected(x)
        parts = [short_conv(part, **conv, segment_ids=segment_ids)[0] for part, conv in self._convs(parts)]
        inputs = self._inputs(parts, dt)
        y, _ = ssd(*inputs, segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, x, inputs[0], y))

    @override
    def _initial_state(self, batch: int, max_len: int) -> Mamba2State:
        conv = jnp.zeros((batch, self.config.d_conv, self.channels), self.dtype)
        return Mamba2State(conv, initial_state(batch, self.num_heads, self.config.d_state, self.config.headdim))

    @override
    def _prefill(self, x: BTD, state: Mamba2State, segment_ids: SegmentIds | None) -> tuple[BTD, Mamba2State]:
        *parts, dt = self._projected(x)
        found = [short_conv(part, **conv, segment_ids=segment_ids) for part, conv in self._convs(parts, state.conv)]
        parts, after = zip(*found, strict=True)
        inputs = self._inputs(parts, dt)
        y, memory = ssd(*inputs, state=state.memory, segment_ids=segment_ids, impl=self.config.impl)
        return self._out(x, inputs[0], y), Mamba2State(jnp.concatenate(after, axis=-1), memory)

    @override
    def _step(self, x: BD, state: Mamba2State) -> tuple[BD | projections.Projected, Mamba2State]:
        inner, bias = self.d_inner, self.conv_bias[...] if self.config.conv_bias else None
        z, joint, dt = jnp.split(self.in_proj(x), [inner, inner + self.channels], axis=-1)
        joint, conv = short_conv_step(joint, self.conv_kernel[...], state.conv, bias=bias, silu=True)
        u, dt, A, B, C = self._inputs((joint[..., :inner], joint[..., inner:]), dt)
        y, memory = ssd_step(u, dt, A, B, C, state.memory, impl=beside(self.config.impl, MATRIX_STATE_STEPS))
        return self._gated(z, u, y), Mamba2State(conv, memory)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return N states of each inner channel, and the inputs of the convolution; equal to the cache's."""
        return self.d_inner * self.config.d_state + self.config.d_conv * self.channels

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return N states of each inner channel, as publications count: without the inputs of the convolution."""
        return self.d_inner * self.config.d_state

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the taps, and writing and reading the state once."""
        projections = self.d_model * (2 * self.d_inner + self.channels + self.num_heads)
        taps = self.config.d_conv * self.channels
        return 2 * (projections + taps) + 4 * self.d_inner * self.config.d_state

    def _projected(self, x):
        """Return x, B beside C, and the steps before their bias; z is left to the end, where it is needed."""
        inner, states = self.d_inner, self.channels - self.d_inner
        u, rest = (projections.linear_part(self.in_proj, x, *ends) for ends in ((inner, 2 * inner), (2 * inner, None)))
        return u, rest[..., :states], rest[..., states:]

    def _convs(self, parts, state=None) -> list[tuple[Array, dict[str, Any]]]:
        """Return x, and B beside C, each with its convolution: cut and joined, x would be copied."""
        ends = (slice(None, self.d_inner), slice(self.d_inner, None))
        biases = [self.conv_bias[...][end] if self.config.conv_bias else None for end in ends]
        convs: list[dict[str, Any]] = [
            {"kernel": self.conv_kernel[...][:, end], "bias": bias, "silu": True}
            for end, bias in zip(ends, biases, strict=True)
        ]
        if state is not None:
            convs = [conv | {"state": state[..., end]} for conv, end in zip(convs, ends, strict=True)]
        return list(zip(parts, convs, strict=True))

    def _inputs(self, parts, dt):
        """Return (x, dt, A, B, C) of the scan by head and by group."""
        (x, BC), groups = parts, self.config.ngroups
        B, C = jnp.split(BC, 2, axis=-1)
        x, B, C = (multihead.split_heads(y, count) for y, count in ((x, self.num_heads), (B, groups), (C, groups)))
        dt = dt.astype(jnp.float32)
        dt = jax.nn.softplus(dt + layers.per_channel(self.dt_bias[...], dt))
        return x, dt, -jnp.exp(self.A_log[...]), B, C

    def _out(self, x, u, y):
        return self._gated(projections.linear_part(self.in_proj, x, 0, self.d_inner), u, y)

    def _gated(self, z, u, y):
        skip = jnp.repeat(self.D[...], self.config.headdim)
        y, u = (multihead.merge_heads(heads) for heads in (y, u))
        assert self.norm.scale is not None
        y = gated_rms_norm(y, u, z, skip, self.norm.scale[...], eps=self.norm.epsilon)
        return projections.into_stream(self.out_proj, y)

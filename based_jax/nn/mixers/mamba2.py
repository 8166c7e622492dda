"""Mamba-2: Mamba's layer with one decay a head, so that its scan is linear attention (SSD, arXiv 2405.21060)."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from based_jax.dims import BD, BP, BPD, BT, BTD
from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.gated import inverse_softplus_dt
from based_jax.ops.conv import short_conv, short_conv_step
from based_jax.ops.decays import initial_state
from based_jax.ops.ssd import BHNP, IMPLEMENTATIONS, ssd, ssd_step


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """States N, taps, inner width as a multiple of D, channels P of a head, and groups of heads that share B and C."""

    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    impl: str = "auto"


class Mamba2Cache(NamedTuple):
    """The inputs of the convolution over x, B and C, and the state (B, H, N, P)."""

    conv: Float[Array, "B W channels"]
    state: BHNP


class Mamba2(nnx.Module):
    """S_t = exp(dt A) S_{t-1} + B_t (dt x_t)^T, y_t = C_t^T S_t + D x_t, RMSNorm of y SiLU(z) (sections 6 and 7).

    Source: HazyResearch/zoology:zoology/mixers/mamba2.py, `Mamba2`.
    """

    Config: ClassVar = Mamba2Config
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    REFERENCE: ClassVar = {
        "zoology": {
            "out_proj/kernel": "out_proj.weight",
            "in_proj/kernel": "in_proj.weight",
            "conv_kernel": "conv1d.weight",
            "conv_bias": "conv1d.bias",
            "dt_bias": "dt_bias",
            "A_log": "A_log",
            "D": "D",
            "norm/scale": "norm.weight",
        }
    }

    def __init__(self, d_model: int, config: Mamba2Config, *, std: float, out_std: float, dtype, rngs: nnx.Rngs):
        for name in ("d_state", "d_conv", "expand", "headdim", "ngroups"):
            if getattr(config, name) < 1:
                raise UserError(f"{name} is {getattr(config, name)}; it is at least 1.")
        self.config = config
        self.d_model = d_model
        self.dtype = dtype
        self.d_inner = config.expand * d_model
        if self.d_inner % config.headdim or (self.d_inner // config.headdim) % config.ngroups:
            raise UserError(
                f"The inner width {self.d_inner} cannot be divided into heads of headdim {config.headdim} in"
                f" {config.ngroups} groups."
            )
        self.num_heads = self.d_inner // config.headdim
        self.channels = self.d_inner + 2 * config.ngroups * config.d_state
        self.in_proj = layers.torch_linear(
            d_model, self.d_inner + self.channels + self.num_heads, False, rngs, names=("embed", "mlp"), dtype=dtype
        )
        self.conv_kernel = layers.uniform((config.d_conv, self.channels), config.d_conv, rngs=rngs)
        self.conv_bias = layers.uniform((self.channels,), config.d_conv, rngs=rngs)
        self.dt_bias = nnx.Param(inverse_softplus_dt(self.num_heads, rngs), **layers.named("heads"))
        A = jax.random.uniform(rngs.params(), (self.num_heads,), minval=1.0, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(A), **layers.named("heads"))
        self.D = nnx.Param(jnp.ones(self.num_heads), **layers.named("heads"))
        self.norm = layers.rms_norm(self.d_inner, rngs=rngs)
        gain = min(1.0, math.sqrt(2) * out_std / std)
        self.out_proj = layers.torch_linear(
            self.d_inner, d_model, False, rngs, names=("mlp", "embed"), dtype=dtype, gain=gain
        )

    def __call__(self, x: BTD, segment_ids: BT | None = None, positions: BP | None = None) -> BPD:
        """Mix a whole sequence."""
        u, dt = self._projected(x)
        u = short_conv(u, **self._conv(), segment_ids=segment_ids)
        inputs = self._inputs(u, dt)
        y = ssd(*inputs, segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, x, inputs[0], y))

    def init_cache(self, batch: int, max_len: int) -> Mamba2Cache:
        """Return the cache before the first token; its size does not depend on `max_len`."""
        conv = jnp.zeros((batch, self.config.d_conv, self.channels), self.dtype)
        return Mamba2Cache(conv, initial_state(batch, self.num_heads, self.config.d_state, self.config.headdim))

    def prefill(self, x: BTD, cache: Mamba2Cache, segment_ids: BT | None = None) -> tuple[BTD, Mamba2Cache]:
        """Mix the next tokens of a sequence and return the cache after them."""
        options: dict[str, Any] = {"segment_ids": segment_ids, "return_state": True}
        u, dt = self._projected(x)
        u, conv = short_conv(u, **self._conv(), state=cache.conv, **options)
        inputs = self._inputs(u, dt)
        y, state = ssd(*inputs, state=cache.state, impl=self.config.impl, **options)
        return self._out(x, inputs[0], y), Mamba2Cache(conv, state)

    def step(self, x: BD, cache: Mamba2Cache) -> tuple[BD, Mamba2Cache]:
        """Mix one token and return the cache after it."""
        u, dt = self._projected(x)
        u, conv = short_conv_step(u, **self._conv(), state=cache.conv)
        u, dt, A, B, C = self._inputs(u, dt)
        y, state = ssd_step(u, dt, A, B, C, cache.state)
        return self._out(x, u, y), Mamba2Cache(conv, state)

    def state_size(self, seq_len: int) -> int:
        """Return N states of each inner channel, and the inputs of the convolution; equal to the cache's."""
        return self.d_inner * self.config.d_state + self.config.d_conv * self.channels

    def published_state_size(self, seq_len: int) -> int:
        """Return N states of each inner channel, as publications count: without the inputs of the convolution."""
        return self.d_inner * self.config.d_state

    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the taps, and writing and reading the state once."""
        projections = self.d_model * (2 * self.d_inner + self.channels + self.num_heads)
        taps = self.config.d_conv * self.channels
        return 2 * (projections + taps) + 4 * self.d_inner * self.config.d_state

    def _projected(self, x):
        ends = self.d_inner, self.d_inner + self.channels, self.d_inner + self.channels + self.num_heads
        return layers.part(self.in_proj, x, *ends[:2]), layers.part(self.in_proj, x, *ends[1:])

    def _conv(self) -> dict[str, Any]:
        return {"kernel": self.conv_kernel[...], "bias": self.conv_bias[...], "silu": True}

    def _inputs(self, u, dt):
        """Return (x, dt, A, B, C) of the scan by head and by group."""
        lead, N = u.shape[:-1], self.config.d_state
        ones = (1,) * len(lead)
        groups = self.config.ngroups * N
        x, B, C = jnp.split(u, [self.d_inner, self.d_inner + groups], axis=-1)
        B, C = (y.reshape(*lead, -1, N) for y in (B, C))
        x = x.reshape(*lead, self.num_heads, -1)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...].reshape(*ones, -1))
        return x, dt, -jnp.exp(self.A_log[...]), B, C

    def _out(self, x, u, y):
        z = layers.part(self.in_proj, x, 0, self.d_inner)
        skip = self.D[...].reshape((1,) * (u.ndim - 2) + (-1, 1)) * u.astype(jnp.float32)
        y = layers.merge_heads(y.astype(jnp.float32) + skip)
        return self.out_proj(self.norm(y * jax.nn.silu(z.astype(jnp.float32))).astype(self.dtype))

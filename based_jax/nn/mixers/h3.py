"""H3: a shift state space on the keys, a diagonal one on keys times values, gated by queries (arXiv 2212.14052)."""

import dataclasses
import math
from typing import ClassVar, override

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from based_jax.dims import BD, BP, BPD, BTD, BWD, WD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers, multihead, projections
from based_jax.nn.gated import log_uniform_dt
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.ops import conv, diagonal_ssm
from based_jax.ops.calls import BHPN2
from based_jax.ops.conv import short_conv, short_conv_step
from based_jax.ops.diagonal_ssm import IMPLEMENTATIONS
from based_jax.ops.dispatch import beside

H3State = tuple[BWD, BHPN2]


@dataclasses.dataclass(frozen=True)
class H3Config:
    """States N of both state spaces, and the channels that a head multiplies crosswise."""

    d_state: int = 64
    head_dim: int = 1
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, d_state=2, head_dim=1)
        if self.d_state % 2:
            raise UserError(f"d_state is {self.d_state}; states come in conjugate pairs, so it is even.")


class H3(Mixer):
    """o = W_o (q * SSM_diag(SSM_shift(k) * v)), heads multiplied crosswise (algorithm 1 of the paper).

    The shift state space is a convolution with N taps, computed from its B and C; the diagonal one is S4D-Lin with
    N/2 conjugate pairs and the bilinear transform. Both have a skip D. As in the publication the output's channels
    are ordered by place in the head first. Its `state_size` counts only D N; ours counts what decoding keeps.

    Source: HazyResearch/zoology:zoology/mixers/h3/h3.py, `H3`.
    """

    Config: ClassVar = H3Config
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    REFERENCE: ClassVar = {
        "zoology": {
            "out_proj/kernel": "output_linear.weight",
            "out_proj/bias": "output_linear.bias",
            **{
                f"{n}_proj/{ours}": f"{n}_proj.{key}"
                for n in "qkv"
                for ours, key in (("kernel", "weight"), ("bias",) * 2)
            },
            "shift_b": "ssm_k_kernel.kernel.B",
            "shift_c": "ssm_k_kernel.kernel.C",
            "shift_skip": "ssm_k_D",
            "log_dt": "kernel.kernel.log_dt",
            "log_a_real": "kernel.kernel.inv_A_real",
            "a_imag": "kernel.kernel.A_imag",
            "b": "kernel.kernel.B",
            "c": "kernel.kernel.C",
            "skip": "D",
        }
    }

    def __init__(self, d_model: int, config: H3Config, init: layers.Init):
        if d_model % config.head_dim:
            raise UserError(f"head_dim {config.head_dim} does not divide d_model {d_model}.")
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.num_heads = d_model // config.head_dim
        H, N = self.num_heads, config.d_state
        self.q_proj, self.k_proj, self.v_proj = (
            layers.linear(d_model, d_model, ("embed", "heads"), init, bias=True) for _ in "qkv"
        )
        self.out_proj = layers.linear(d_model, d_model, ("heads", "embed"), init.out, bias=True)
        self.shift_b = _param(jnp.zeros((d_model, N)).at[:, 0].set(1.0))
        bound = 1 / math.sqrt(N)
        self.shift_c = _param(jax.random.uniform(init.rngs.params(), (d_model, N), minval=-bound, maxval=bound))
        self.shift_skip = _param(jax.random.normal(init.rngs.params(), (d_model,)))
        self.log_dt = _param(log_uniform_dt(H, init.rngs))
        self.log_a_real = _param(jnp.full((H, N // 2), math.log(0.5)))
        self.a_imag = _param(jnp.broadcast_to(math.pi * jnp.arange(N // 2), (H, N // 2)))
        self.b = _param(jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (H, N // 2, 2)))
        self.c = _param(jax.random.normal(init.rngs.params(), (H, N // 2, 2)) * math.sqrt(0.5))
        self.skip = _param(jax.random.normal(init.rngs.params(), (H,)))

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        k, v = self.k_proj(x), self.v_proj(x)
        k, _ = short_conv(k, self._shift_kernel(), segment_ids=segment_ids, impl=self._shift_impl)
        kv = self._cross(k, v)
        y, _ = diagonal_ssm.diagonal_ssm(kv, *self._system(), segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, x, kv, y))

    @override
    def _initial_state(self, batch: int, max_len: int) -> H3State:
        shift = jnp.zeros((batch, self.config.d_state, self.d_model), self.dtype)
        return shift, diagonal_ssm.initial_state(
            batch, self.num_heads, self.config.head_dim**2, self.config.d_state // 2
        )

    @override
    def _prefill(self, x: BTD, state: H3State, segment_ids: SegmentIds | None) -> tuple[BTD, H3State]:
        k, v = self.k_proj(x), self.v_proj(x)
        k, shift = short_conv(k, self._shift_kernel(), state=state[0], segment_ids=segment_ids, impl=self._shift_impl)
        kv = self._cross(k, v)
        y, after = diagonal_ssm.diagonal_ssm(
            kv, *self._system(), state=state[1], segment_ids=segment_ids, impl=self.config.impl
        )
        return self._out(x, kv, y), (shift, after)

    @override
    def _step(self, x: BD, state: H3State) -> tuple[BD | projections.Projected, H3State]:
        k, v = self.k_proj(x), self.v_proj(x)
        k, shift = short_conv_step(k, self._shift_kernel(), state[0])
        kv = self._cross(k, v)
        y, after = diagonal_ssm.diagonal_ssm_step(kv, *self._system(), state[1])
        return self._out(x, kv, y), (shift, after)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return D N for the shift and D N head_dim real numbers for the diagonal state space; equal to the cache's."""
        return self.d_model * self.config.d_state * (1 + self.config.head_dim)

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return D N, as the publication counts it."""
        return self.d_model * self.config.d_state

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the taps, and writing and reading the complex state once."""
        return 8 * self.d_model**2 + 8 * self.state_size(seq_len)

    @property
    def _shift_impl(self) -> str:
        return beside(self.config.impl, conv.IMPLEMENTATIONS)

    def _shift_kernel(self) -> WD:
        """Return the taps sum_n B_n C_{n+l} of lag l, the newest last, with the skip on the token itself."""
        N = self.config.d_state
        b, c = (jnp.fft.rfft(x[...].astype(jnp.float32), n=2 * N) for x in (self.shift_b, self.shift_c))
        taps = jnp.fft.irfft(jnp.conj(b) * c, n=2 * N)[:, :N]
        return taps.at[:, 0].add(self.shift_skip[...])[:, ::-1].T

    def _system(self) -> tuple[Array, Array, Array]:
        """Return log a, b and c of the discretised diagonal state space, each (H, N/2) complex."""
        dt = jnp.exp(self.log_dt[...])[:, None]
        a = jax.lax.complex(-jnp.exp(self.log_a_real[...]), self.a_imag[...]) * dt
        b, c = (jax.lax.complex(x[..., 0], x[..., 1]) for x in (self.b[...], self.c[...]))
        return jnp.log((1 + a / 2) / (1 - a / 2)), b * dt / (1 - a / 2), c

    def _cross(self, k, v) -> Float[Array, "*B H P"]:
        """Return the products of each pair of channels of a head."""
        k, v = (multihead.split_heads(x, self.num_heads) for x in (k, v))
        return einops.rearrange(k[..., :, None] * v[..., None, :], "... H i j -> ... H (i j)")

    def _out(self, x, kv, y):
        q = multihead.split_heads(self.q_proj(x), self.num_heads).astype(jnp.float32)
        kv = kv.astype(jnp.float32)
        y = y + kv * layers.per_channel(self.skip[...][:, None], kv)
        y = einops.rearrange(y, "... H (i j) -> ... H i j", i=self.config.head_dim) * q[..., None]
        y = einops.reduce(y, "... H i j -> ... (j H)", "sum")
        return projections.into_stream(self.out_proj, y.astype(self.dtype))


def _param(values: Array) -> nnx.Param:
    """Return a parameter whose first axis counts channels or heads."""
    return nnx.Param(jnp.array(values, jnp.float32), **layers.logical_axes("heads", *(None,) * (values.ndim - 1)))

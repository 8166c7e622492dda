"""Hyena of order 2: gates around a long convolution whose filter an MLP computes from time (arXiv 2302.10866)."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import ClassVar, override

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.nn import layers, projections
from based_jax.nn.cache import TokenCache
from based_jax.nn.history import LONGEST_FILTER, check_length, convolve_on, convolve_step, empty_history, time_embedding
from based_jax.nn.mixer import Buffer, Mixer, check_sizes
from based_jax.ops import conv
from based_jax.ops.conv import short_conv, short_conv_step
from based_jax.ops.dispatch import beside
from based_jax.ops.long_conv import IMPLEMENTATIONS, fft_flops, long_conv

HyenaState = tuple[Float[Array, "B W inner"], TokenCache]

TIME_FEATURES, SHORT_TAPS = 3, 3
MOST_HIDDEN_LAYERS = 1000
FAST_DECAY, SLOW_DECAY, DECAY_TARGET = 0.3, 1.5, 1e-2  # parts of l_max in which the window falls to the target


@dataclasses.dataclass(frozen=True)
class HyenaConfig:
    """The longest sequence, the width of the filter's MLP, and its hidden layers behind the first."""

    l_max: int = 2048
    filter_order: int = 64
    num_inner_mlps: int = 2
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, l_max=2, most=LONGEST_FILTER)
        check_sizes(self, filter_order=1)
        check_sizes(self, num_inner_mlps=0, most=MOST_HIDDEN_LAYERS)


class Filter(nnx.Module):
    """h(t) = MLP([t, cos wt, -sin wt]) exp(-t |delta|): sines of learned frequency, and a window of each channel's own.

    Source: HazyResearch/zoology:zoology/mixers/hyena.py, `Filter`; section 3.3 and appendix D.3 of the paper.
    """

    def __init__(self, d_model: int, config: HyenaConfig, init: layers.Init):
        widths = (TIME_FEATURES, *(config.filter_order,) * (1 + config.num_inner_mlps))
        self.pos_emb = nnx.Param(time_embedding(config.l_max), **layers.logical_axes(None, None))
        self.hidden = nnx.List(
            [layers.torch_linear(a, b, (None, None), init.fp32, bias=True) for a, b in itertools.pairwise(widths)]
        )
        self.frequency = nnx.Param(jnp.ones(config.filter_order), **layers.logical_axes(None))
        self.out = layers.torch_linear(config.filter_order, d_model, (None, None), init.fp32)

    def __call__(self, length: int) -> Float[Array, "_ D"]:
        """Return the taps of the first `length` lags."""
        h = self.pos_emb[:length]
        for layer in self.hidden:
            h = jnp.sin(layer(h) * self.frequency[...][None])
        h = self.out(h)
        return h * np.exp(-self.time()[:length, None] * np.abs(self.slopes())).astype(np.float32)

    def time(self) -> np.ndarray:
        """Return the place of each lag between 0 and 1 (l_max)."""
        return np.linspace(0, 1, self.pos_emb.shape[-2])

    def slopes(self) -> np.ndarray:
        """Return the exponent by which each channel's window falls over the whole time (D), negative."""
        slowest, fastest = (math.log(DECAY_TARGET) / part for part in (SLOW_DECAY, FAST_DECAY))
        return np.linspace(slowest, fastest, self.out.out_features)


class Hyena(Mixer):
    """y = W_o (x2 * (h conv (v * x1) + bias (v * x1))), (x1, x2, v) short-convolved projections of x.

    Decoding keeps every input of the long convolution, D elements a token, and sums over them at each step.

    Source: HazyResearch/zoology:zoology/mixers/hyena.py, `Hyena`.
    """

    Config: ClassVar = HyenaConfig
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    REFERENCE: ClassVar = {
        "zoology": {
            "out_proj/kernel": "out_proj.weight",
            "out_proj/bias": "out_proj.bias",
            "in_proj/kernel": "in_proj.weight",
            "in_proj/bias": "in_proj.bias",
            "conv_kernel": "short_filter.weight",
            "conv_bias": "short_filter.bias",
            "skip": "filter_fn.bias",
            "filter/pos_emb": "filter_fn.pos_emb.z",
            "filter/frequency": "filter_fn.implicit_filter.1.freq",
            **{f"filter/hidden/{i}/kernel": f"filter_fn.implicit_filter.{2 * i}.weight" for i in range(3)},
            **{f"filter/hidden/{i}/bias": f"filter_fn.implicit_filter.{2 * i}.bias" for i in range(3)},
            "filter/out/kernel": "filter_fn.implicit_filter.6.weight",
        }
    }

    def __init__(self, d_model: int, config: HyenaConfig, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        widths = (d_model, d_model, d_model)
        self.in_proj = layers.linear(d_model, sum(widths), ("embed", "mlp"), init, bias=True, parts=widths)
        self.conv_kernel = layers.conv_parameter((SHORT_TAPS, 3 * d_model), SHORT_TAPS, rngs=init.rngs)
        self.conv_bias = layers.conv_parameter((3 * d_model,), SHORT_TAPS, rngs=init.rngs)
        self.filter = Filter(d_model, config, init)
        self.skip = nnx.Param(jax.random.normal(init.rngs.params(), (d_model,)), **layers.logical_axes("embed"))
        self.out_proj = layers.linear(d_model, d_model, ("mlp", "embed"), init.out, bias=True)

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        """Mix a whole sequence of at most `l_max` tokens."""
        check_length(x.shape[1], self.config.l_max)
        u, _ = short_conv(
            self.in_proj(x),
            self.conv_kernel[...],
            bias=self.conv_bias[...],
            segment_ids=segment_ids,
            impl=self._short_impl,
        )
        u, gate = self._gated(u)
        y = long_conv(u, self.filter(x.shape[1]), segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, u, y, gate))

    @property
    @override
    def max_len(self) -> int:
        return self.config.l_max

    @override
    def _initial_state(self, batch: int, max_len: int) -> HyenaState:
        """Return the inputs of both convolutions before the first of up to `max_len` tokens."""
        check_length(max_len, self.config.l_max)
        taps = jnp.zeros((batch, SHORT_TAPS, 3 * self.d_model), self.dtype)
        return taps, empty_history(batch, max_len, self.d_model)

    @override
    def _prefill(self, x: BTD, state: HyenaState, segment_ids: SegmentIds | None) -> tuple[BTD, HyenaState]:
        u, taps = short_conv(
            self.in_proj(x),
            self.conv_kernel[...],
            bias=self.conv_bias[...],
            state=state[0],
            segment_ids=segment_ids,
            impl=self._short_impl,
        )
        u, gate = self._gated(u)
        y, history = convolve_on(u, state[1], self.filter(state[1].slots), segment_ids, self.config.impl)
        return self._out(u, y, gate), (taps, history)

    @override
    def _step(self, x: BD, state: HyenaState) -> tuple[BD | projections.Projected, HyenaState]:
        u, taps = short_conv_step(self.in_proj(x), self.conv_kernel[...], state[0], bias=self.conv_bias[...])
        u, gate = self._gated(u)
        y, history = convolve_step(u, state[1], self.filter(state[1].slots))
        return self._out(u, y, gate), (taps, history)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return D elements a token, and the inputs of the short convolution; equal to the cache's."""
        return self.d_model * (seq_len + 3 * SHORT_TAPS)

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return D elements a token, as publications count: without the inputs of the short convolution."""
        return self.d_model * seq_len

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: projections, the filter's MLP at one lag, and three FFTs of twice the length."""
        hidden = self.config.filter_order * (TIME_FEATURES + self.config.num_inner_mlps * self.config.filter_order)
        filter_flops = 2 * (TIME_FEATURES * seq_len + hidden + self.config.filter_order * self.d_model)
        convolutions = (6 * SHORT_TAPS + fft_flops(seq_len)) * self.d_model
        return 8 * self.d_model**2 + convolutions + filter_flops

    @override
    def reference_buffers(self) -> Mapping[str, Buffer]:
        first, *others = (f"filter_fn.implicit_filter.{2 * i + 1}.freq" for i in range(1 + self.config.num_inner_mlps))
        return {
            **dict.fromkeys(others, first),
            "filter_fn.modulation.deltas": self.filter.slopes(),
            "filter_fn.pos_emb.t": self.filter.time(),
        }

    @property
    def _short_impl(self) -> str:
        return beside(self.config.impl, conv.IMPLEMENTATIONS)

    def _gated(self, u):
        x1, x2, v = jnp.split(u, 3, axis=-1)
        return v * x1, x2

    def _out(self, u, y, gate):
        y = y + u * layers.per_channel(self.skip[...], u)
        return projections.into_stream(self.out_proj, y * gate)

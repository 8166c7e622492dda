"""BaseConv with a convolution as long as the sequence, every tap a parameter (arXiv 2312.04927, section 4)."""

import dataclasses
from typing import ClassVar, override

import jax
from flax import nnx
from jaxtyping import Array, Float

from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.nn import layers
from based_jax.nn.cache import TokenCache
from based_jax.nn.history import LONGEST_FILTER, check_length, convolve_on, convolve_step, empty_history
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.ops.long_conv import IMPLEMENTATIONS, fft_flops, long_conv


@dataclasses.dataclass(frozen=True)
class LongConvConfig:
    """The longest sequence, which is the number of taps."""

    l_max: int = 2048
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, l_max=1, most=LONGEST_FILTER)


class LongConv(Mixer):
    """y = (conv(x) + x) * projection(x) + x; decoding keeps every input and sums over them at each step.

    Source: HazyResearch/zoology:zoology/mixers/base_conv.py with kernel_size -1 and
    zoology/mixers/convolution.py, `LongConvolution`.
    """

    Config: ClassVar = LongConvConfig
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    REFERENCE: ClassVar = {
        "zoology": {
            "projection/kernel": "projection.weight",
            "projection/bias": "projection.bias",
            "taps": "conv.filter",
        }
    }

    def __init__(self, d_model: int, config: LongConvConfig, init: layers.Init):
        self.config, self.d_model = config, d_model
        self.projection = layers.linear(d_model, d_model, ("embed", "mlp"), init, bias=True)
        self._init_filter(init)

    def _init_filter(self, init: layers.Init) -> None:
        shape = (self.d_model, self.config.l_max)
        self.taps = nnx.Param(jax.random.normal(init.rngs.params(), shape), **layers.logical_axes("mlp", None))

    def filter(self, length: int) -> Float[Array, "_ D"]:
        """Return the taps of the first `length` lags."""
        return self.taps[:, :length].T

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        """Mix a whole sequence of at most `l_max` tokens."""
        check_length(x.shape[1], self.config.l_max)
        y = long_conv(x, self.filter(x.shape[1]), segment_ids=segment_ids, impl=self.config.impl)
        return self._gate(*layers.at(positions, x, y))

    @property
    @override
    def max_len(self) -> int:
        return self.config.l_max

    @override
    def _initial_state(self, batch: int, max_len: int) -> TokenCache:
        """Return the inputs before the first of up to `max_len` tokens."""
        check_length(max_len, self.config.l_max)
        return empty_history(batch, max_len, self.d_model)

    @override
    def _prefill(self, x: BTD, state: TokenCache, segment_ids: SegmentIds | None) -> tuple[BTD, TokenCache]:
        y, state = convolve_on(x, state, self.filter(state.slots), segment_ids, self.config.impl)
        return self._gate(x, y), state

    @override
    def _step(self, x: BD, state: TokenCache) -> tuple[BD, TokenCache]:
        y, state = convolve_step(x, state, self.filter(state.slots))
        return self._gate(x, y), state

    @override
    def state_size(self, seq_len: int) -> int:
        """Return D elements a token; equal to the cache's."""
        return self.d_model * seq_len

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projection, and three FFTs of twice the length."""
        return 2 * self.d_model**2 + fft_flops(seq_len) * self.d_model

    def _gate(self, x, y):
        return (y + x) * self.projection(x) + x

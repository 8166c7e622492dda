"""The gated convolution of the MQAR models, zoology's "BaseConv" (arXiv 2312.04927, section 4)."""

import dataclasses
from typing import ClassVar, override

import jax
import jax.numpy as jnp

from based_jax.config import added_later
from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.nn import layers
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.ops.calls import Past
from based_jax.ops.conv import IMPLEMENTATIONS, reach, short_conv, short_conv_step


@dataclasses.dataclass(frozen=True)
class BaseConvConfig:
    """Taps of the convolution, the tokens from one to the next, and whether SiLU follows convolution and projection."""

    kernel_size: int = 3
    dilation: int = 1
    impl: str = "auto"
    use_act: bool = added_later(False)

    def __post_init__(self):
        check_sizes(self, kernel_size=1, dilation=1)


class BaseConv(Mixer):
    """y = (conv(x) + bias) * projection(x) + x, the residual inside; the state is the last taps' inputs.

    Source: HazyResearch/zoology:zoology/mixers/base_conv.py, `BaseConv` with a short kernel.
    """

    Config: ClassVar = BaseConvConfig
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    REFERENCE: ClassVar = {
        "zoology": {
            "projection/kernel": "projection.weight",
            "projection/bias": "projection.bias",
            "conv_kernel": "conv.conv.weight",
            "conv_bias": "conv.conv.bias",
        }
    }

    def __init__(self, d_model: int, config: BaseConvConfig, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.projection = layers.linear(d_model, d_model, ("embed", "mlp"), init, bias=True)
        self.conv_kernel = layers.conv_parameter((config.kernel_size, d_model), config.kernel_size, rngs=init.rngs)
        self.conv_bias = layers.conv_parameter((d_model,), config.kernel_size, rngs=init.rngs)

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        y, _ = short_conv(
            x,
            self.conv_kernel[...],
            bias=self.conv_bias[...],
            dilation=self.config.dilation,
            segment_ids=segment_ids,
            impl=self.config.impl,
        )
        return self._gate(*layers.at(positions, x, y))

    @override
    def _initial_state(self, batch: int, max_len: int) -> Past:
        return jnp.zeros((batch, self._reach, self.d_model), self.dtype)

    @override
    def _prefill(self, x: BTD, state: Past, segment_ids: SegmentIds | None) -> tuple[BTD, Past]:
        y, state = short_conv(
            x,
            self.conv_kernel[...],
            bias=self.conv_bias[...],
            dilation=self.config.dilation,
            state=state,
            segment_ids=segment_ids,
            impl=self.config.impl,
        )
        return self._gate(x, y), state

    @override
    def _step(self, x: BD, state: Past) -> tuple[BD, Past]:
        y, state = short_conv_step(
            x, self.conv_kernel[...], state, bias=self.conv_bias[...], dilation=self.config.dilation
        )
        return self._gate(x, y), state

    @override
    def state_size(self, seq_len: int) -> int:
        """Return each channel's inputs from the first tap to the last; equal to the cache's."""
        return self._reach * self.d_model

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projection and the taps."""
        return 2 * self.d_model**2 + 2 * self.config.kernel_size * self.d_model

    def _gate(self, x, y):
        activation = jax.nn.silu if self.config.use_act else lambda factor: factor
        return activation(y) * activation(self.projection(x)) + x

    @property
    def _reach(self) -> int:
        return reach(self.config.kernel_size, self.config.dilation)

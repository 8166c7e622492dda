"""The gated short convolution of Based's language models, "BaseConv" (arXiv 2402.18668, section 4.3)."""

import dataclasses
from typing import Any, ClassVar, override

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers, projections
from based_jax.nn.cache import Cache
from based_jax.nn.mixer import Mixer, check_sizes
from based_jax.ops import sharded
from based_jax.ops.conv import first_inputs_after
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.dispatch import beside
from based_jax.ops.gated_conv import (
    IMPLEMENTATIONS,
    STEP_IMPLEMENTATIONS,
    convolved_inputs,
    gated_short_conv,
    gated_short_conv_step,
)
from based_jax.ops.token_layer import token_conv

Inputs = Float[Array, "B W inner"]
NewInputs = Float[Array, "B T inner"]
FEW_TOKENS_IMPL = "xla_taps"


@dataclasses.dataclass(frozen=True)
class GatedConvConfig:
    """Taps of the convolution, and the width of the input projection as a multiple of D (half of it is the gate)."""

    kernel_size: int = 3
    expand: int = 4
    impl: str = "auto"

    def __post_init__(self):
        check_sizes(self, kernel_size=1, expand=2)
        if self.expand % 2:
            raise UserError(f"expand is {self.expand}; half of the projection gates the other, so it is even.")


class GatedConv(Mixer):
    """y = out_proj(SiLU(conv(u1)) * u2) with (u1, u2) = in_proj(x); the state is the last taps' inputs.

    Source: HazyResearch/based:based/models/mixers/convolution.py, `BaseConv`.
    """

    Config: ClassVar = GatedConvConfig
    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    REFERENCE: ClassVar = {
        "based": {
            "out_proj/kernel": "out_proj.weight",
            "out_proj/bias": "out_proj.bias",
            "in_proj/kernel": "in_proj.weight",
            "in_proj/bias": "in_proj.bias",
            "conv_kernel": "conv.conv.weight",
        }
    }

    def __init__(self, d_model: int, config: GatedConvConfig, init: layers.Init):
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.d_inner = config.expand * d_model // 2
        widths = (self.d_inner, self.d_inner)
        self.in_proj = layers.linear(d_model, sum(widths), ("embed", "mlp"), init, bias=True, parts=widths)
        self.conv_kernel = layers.conv_parameter((config.kernel_size, self.d_inner), config.kernel_size, rngs=init.rngs)
        self.out_proj = layers.linear(self.d_inner, d_model, ("mlp", "embed"), init.out, bias=True)

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        y, _ = self._convolve(x, segment_ids=segment_ids)
        return self.out_proj(*layers.at(positions, y))

    @override
    def _initial_state(self, batch: int, max_len: int) -> Inputs:
        return jnp.zeros((batch, self.config.kernel_size, self.d_inner), self.dtype)

    @override
    def _prefill(self, x: BTD, state: Inputs, segment_ids: SegmentIds | None) -> tuple[BTD, Inputs]:
        y, state = self._convolve(x, state=state, segment_ids=segment_ids)
        return self.out_proj(y), state

    def _convolve(
        self, x: BTD, state: Inputs | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Float[Array, "B T inner"], Inputs]:
        """Project, convolve and gate; the operation adds the projection's bias, where it reads the product anyway."""

        def convolved(product, bias, kernel, state, segment_ids):
            given = {"bias": bias, "state": state, "segment_ids": segment_ids, "impl": self.config.impl}
            return gated_short_conv(product, kernel, **given)

        product, bias = projections.joined_by_device(self.in_proj, x.astype(self.dtype), (self.d_inner, self.d_inner))
        given = product, bias, self.conv_kernel[...], state, segment_ids
        return sharded.by_channels(convolved, given, (2, 0, 1, 2, None), (2, 2), self.d_inner)

    @override
    def _step(self, x: BD, state: Inputs) -> tuple[BD | projections.Projected, Inputs]:
        impl = beside(self.config.impl, STEP_IMPLEMENTATIONS)
        product, bias = projections.joined_by_device(self.in_proj, x.astype(self.dtype), (self.d_inner, self.d_inner))
        y, state = gated_short_conv_step(product, self.conv_kernel[...], state, bias=bias, impl=impl)
        return projections.into_stream(self.out_proj, y), state

    @override
    def _try_tokens(self, x: BTD, state: Inputs) -> tuple[BTD, tuple[NewInputs, Inputs]]:
        """Convolve in XLA's form, unless another one is asked for: kernels want more tokens."""
        impl = FEW_TOKENS_IMPL if self.config.impl == "auto" else self.config.impl

        def tried(product, bias, kernel, state):
            y, _ = gated_short_conv(product, kernel, bias=bias, state=state, impl=impl)
            return y, convolved_inputs(product, kernel.shape[-1], bias)

        product, bias = projections.joined_by_device(self.in_proj, x.astype(self.dtype), (self.d_inner, self.d_inner))
        given = product, bias, self.conv_kernel[...], state
        y, inputs = sharded.by_channels(tried, given, (2, 0, 1, 2), (2, 2), self.d_inner)
        return self.out_proj(y), (inputs, state)

    @override
    def _keep(self, tokens: tuple[NewInputs, Inputs], counts: Int[Array, "B"]) -> Inputs:
        inputs, state = tokens
        return first_inputs_after(inputs, counts, state)

    @override
    def step_whole(self, r: BD, y: Pieces | None, norm: Any, cache: Cache) -> tuple[BD, Pieces, Cache] | None:
        if self.config.impl != "auto" or self.in_proj.bias is None or self.out_proj.bias is None:
            return None
        first, second = (layer.kernel[...].astype(self.dtype) for layer in (self.in_proj, self.out_proj))
        inner = first, self.in_proj.bias[...], self.conv_kernel[...], cache.state, second, self.out_proj.bias[...]
        r, y, state = token_conv(r, y, norm.scale[...], *inner, eps=norm.epsilon)
        return r, y, cache._replace(state=state)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return one input per tap and inner channel; equal to the cache's."""
        return self.config.kernel_size * self.d_inner

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections and the taps."""
        return 6 * self.d_model * self.d_inner + 2 * self.config.kernel_size * self.d_inner

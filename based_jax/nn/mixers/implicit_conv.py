"""BaseConv with a convolution as long as the sequence, its taps an MLP of time (arXiv 2312.04927, section 4)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, override

import jax
import numpy as np
from jaxtyping import Array, Float

from based_jax.nn import layers
from based_jax.nn.history import time_embedding
from based_jax.nn.mixer import Buffer, check_sizes
from based_jax.nn.mixers.long_conv import LongConv, LongConvConfig


@dataclasses.dataclass(frozen=True)
class ImplicitConvConfig(LongConvConfig):
    """The longest sequence, and the hidden width of the filter's MLP."""

    hidden_dim: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, hidden_dim=1)


class ImplicitConv(LongConv):
    """`LongConv` whose taps are W2 relu(W1 [t, cos wt, -sin wt] + b1) + b2.

    Source: HazyResearch/zoology:zoology/mixers/convolution.py, `ImplicitLongConvolution`.
    """

    Config: ClassVar = ImplicitConvConfig
    REFERENCE: ClassVar = {
        "zoology": {
            "projection/kernel": "projection.weight",
            "projection/bias": "projection.bias",
            "hidden/kernel": "conv.mlp.0.weight",
            "hidden/bias": "conv.mlp.0.bias",
            "out/kernel": "conv.mlp.2.weight",
            "out/bias": "conv.mlp.2.bias",
        }
    }

    def __init__(self, d_model: int, config: ImplicitConvConfig, init: layers.Init):
        self.hidden_dim = config.hidden_dim
        super().__init__(d_model, config, init)

    @override
    def _init_filter(self, init: layers.Init) -> None:
        self.hidden = layers.torch_linear(3, self.hidden_dim, (None, None), init.fp32, bias=True)
        self.out = layers.torch_linear(self.hidden_dim, self.d_model, (None, None), init.fp32, bias=True)

    @override
    def filter(self, length: int) -> Float[Array, "_ D"]:
        """Return the taps of the first `length` lags."""
        return self.out(jax.nn.relu(self.hidden(time_embedding(self.config.l_max)[:length])))

    @override
    def reference_buffers(self) -> Mapping[str, Buffer]:
        return {"conv.pos_emb.z": np.asarray(time_embedding(self.config.l_max))}

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: those of `LongConv`, and the filter's MLP at one lag."""
        return super().flops_per_token(seq_len) + 2 * self.hidden_dim * (3 + self.d_model)

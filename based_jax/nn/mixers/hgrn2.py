"""HGRN2: gated linear attention whose keys are what the gates forget (arXiv 2404.07904, section 3)."""

import dataclasses
from typing import ClassVar, override

import jax

from based_jax.config import added_later
from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.gated import GatedLinearMixer
from based_jax.nn.mixer import check_sizes


@dataclasses.dataclass(frozen=True)
class HGRN2Config:
    """Key channels of a head (heads are D divided by them), the least share that a gate keeps, and taps (0: none)."""

    expand_ratio: int = 128
    lower_bound: float = 0.0
    impl: str = "auto"
    conv_size: int = added_later(0)

    def __post_init__(self):
        check_sizes(self, expand_ratio=1, conv_size=0)
        if not 0 <= self.lower_bound < 1:
            raise UserError(f"lower_bound is {self.lower_bound}; it is at least 0 and below 1.")


class HGRN2(GatedLinearMixer):
    """a = lb + (1 - lb) sigmoid(f), k = 1 - a, q = SiLU(W_q x), RMSNorm over all heads, no gate (equation 6).

    The publication learns the lower bounds of all layers together; here each layer is told its own.
    Source: fla-org/flash-linear-attention:fla/layers/hgrn2.py, `HGRN2Attention`.
    """

    Config: ClassVar = HGRN2Config
    conv_silu: ClassVar = False
    gate_activation: ClassVar = None
    norm_over_heads: ClassVar = True
    REFERENCE: ClassVar = {
        "fla": {
            "out_proj/kernel": "o_proj.weight",
            "qkv/kernel": ("q_proj.weight", "f_proj.weight", "i_proj.weight"),
            "conv_kernel": ("q_conv1d.weight", "f_conv1d.weight", "i_conv1d.weight"),
            "norm/scale": "g_norm.weight",
        }
    }

    def __init__(self, d_model: int, config: HGRN2Config, init: layers.Init):
        if d_model % config.expand_ratio:
            raise UserError(f"expand_ratio {config.expand_ratio} does not divide d_model {d_model}.")
        super().__init__(
            d_model,
            config,
            init,
            num_heads=d_model // config.expand_ratio,
            key_dim=d_model,
            value_dim=d_model,
            conv_size=config.conv_size,
        )

    @override
    def _gated(self, x, q, k, v):
        f, bound = k.astype("float32"), self.config.lower_bound
        if bound:
            kept = bound + (1 - bound) * jax.nn.sigmoid(f)
            return jax.nn.silu(q), 1 - kept, v, jax.numpy.log(kept)
        return jax.nn.silu(q), jax.nn.sigmoid(-f), v, jax.nn.log_sigmoid(f)

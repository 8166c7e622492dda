"""Bytes of state as the publications count them, so that our points stand where theirs do.

They count what a mixer remembers of a sequence, in fp32: the recurrent matrix, or the keys and values. What decoding
keeps beside it, a short convolution's last inputs or the token before, is left out, except in GLA. A mixer's own
`state_size` counts that too: it is the cache.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from based_jax.errors import UserError
from based_jax.nn.feature_maps import FEATURE_MAPS
from based_jax.nn.gated import expanded
from based_jax.nn.layers import Init, head_dim
from based_jax.nn.mixers import MIXERS, check_options
from based_jax.ops.taylor import expanded_dim

Layers = Iterable[tuple[str, Mapping[str, Any]]]
Elements = Callable[[Any, int, int], int]
"""From a mixer's config, the width D and the tokens T."""

CONVOLUTIONS = ("base_conv", "conv", "rwkv4_channel_mix", "rwkv7_channel_mix")
"""Layers that see a few tokens: not the main mixer of a model that has others."""
ELEMENT_BYTES = 4


def _keys_and_values(c, D: int, tokens: int) -> int:
    heads = c.num_heads if c.num_kv_heads is None else c.num_kv_heads
    return 2 * heads * head_dim(D, c.num_heads) * tokens


def _taylor(c, D: int, T: int) -> int:
    return c.num_heads * (head_dim(D, c.num_heads) + 1) * expanded_dim(c.feature_dim)


def _linear(c, D: int, T: int) -> int:
    return c.num_heads * (head_dim(D, c.num_heads) + 1) * _features(c.feature_map, c.num_heads, c.feature_dim)


@functools.cache
def _features(name: str, num_heads: int, feature_dim: int) -> int:
    return nnx.eval_shape(lambda: FEATURE_MAPS[name](num_heads, feature_dim, rngs=nnx.Rngs(0))).expanded_dim


def _widths(c, D: int) -> tuple[int, int]:
    return expanded("expand_k", D, c.expand_k, c.num_heads), expanded("expand_v", D, c.expand_v, c.num_heads)


def _matrix(c, D: int, T: int) -> int:
    key_dim, value_dim = _widths(c, D)
    return key_dim * value_dim // c.num_heads


def _gla(c, D: int, T: int) -> int:
    key_dim, value_dim = _widths(c, D)
    return _matrix(c, D, T) + c.conv_size * (2 * key_dim + value_dim)


def _gsa(c, D: int, T: int) -> int:
    return c.num_slots * sum(_widths(c, D))


ELEMENTS: dict[str, Elements] = {
    "attention": _keys_and_values,
    "base_conv": lambda c, D, T: ((c.kernel_size - 1) * c.dilation + 1) * D,
    "conv": lambda c, D, T: c.kernel_size * (c.expand * D // 2),
    "deltanet": _matrix,
    "gated_deltanet": _matrix,
    "gla": _gla,
    "gsa": _gsa,
    "h3": lambda c, D, T: D * c.d_state,
    "hgrn2": lambda c, D, T: D * c.expand_ratio,
    "hyena": lambda c, D, T: D * T,
    "implicit_conv": lambda c, D, T: D * T,
    "kda": lambda c, D, T: c.num_heads * c.head_dim * int(c.head_dim * c.expand_v),
    "lightning": lambda c, D, T: D * head_dim(D, c.num_heads),
    "linear": _linear,
    "long_conv": lambda c, D, T: D * T,
    "mamba": lambda c, D, T: c.expand * D * c.d_state,
    "mamba2": lambda c, D, T: c.expand * D * c.d_state,
    "prefix": _taylor,
    "retnet": _matrix,
    "rwkv4": lambda c, D, T: 3 * D,
    "rwkv4_channel_mix": lambda c, D, T: D,
    "rwkv5": lambda c, D, T: D * c.head_size,
    "rwkv6": _matrix,
    "rwkv7": lambda c, D, T: D * c.head_dim,
    "rwkv7_channel_mix": lambda c, D, T: D,
    "simple_gla": _matrix,
    "taylor": _taylor,
    "window": lambda c, D, T: _keys_and_values(c, D, c.window),
}


def state_elements(layers: Layers, d_model: int, seq_len: int, *, convolution: bool) -> int:
    """Return the elements of state of one sequence, over all layers that count.

    Args:
      layers: (mixer name, options of its Config) in order, as `LMConfig.layers`.
      d_model: width D.
      seq_len: tokens read.
      convolution: count `CONVOLUTIONS` too, as zoology's re-run of January 2026 does; Figure 2 of arXiv 2402.18668
        counts the main mixers alone. A model that is nothing but convolutions is counted whole either way.

    Raises:
      UserError: no layers, an unknown mixer or option, a width that the heads do not divide, or a number below 1.

    Source: `state_size()` of each mixer in HazyResearch/zoology:zoology/mixers/; for mixers that it lacks, the same.
    """
    for name, value in {"d_model": d_model, "seq_len": seq_len}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it is at least 1.")
    counted = counted_layers(layers, convolution=convolution)
    return sum(_elements(kind, MIXERS[kind].Config(**options), d_model, seq_len) for kind, options in counted)


def _elements(kind: str, config: Any, d_model: int, seq_len: int) -> int:
    """Return what a layer counts; a mixer that nobody has published counts as its cache."""
    if kind in ELEMENTS:
        return ELEMENTS[kind](config, d_model, seq_len)

    def make():
        return MIXERS[kind](d_model, config, Init(1.0, 1.0, jnp.float32, nnx.Rngs(0)))

    return nnx.eval_shape(make).state_size(seq_len)


def state_bytes(layers: Layers, d_model: int, seq_len: int, *, convolution: bool) -> int:
    """Return the same in bytes of fp32; for arguments and errors see `state_elements`."""
    return ELEMENT_BYTES * state_elements(layers, d_model, seq_len, convolution=convolution)


def counted_layers(layers: Layers, *, convolution: bool) -> list[tuple[str, dict[str, Any]]]:
    """Return the layers that count; for errors see `state_elements`."""
    found = [(kind, dict(options)) for kind, options in layers]
    if not found:
        raise UserError("layers is empty; name at least one mixer.")
    for kind, options in found:
        check_options(kind, options)
    main = [(kind, options) for kind, options in found if kind not in CONVOLUTIONS]
    return found if convolution or not main else main

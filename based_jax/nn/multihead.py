"""Heads of a projection, as wide as an operation wants them, and rotary positions of theirs."""

from collections.abc import Callable, Sequence

import einops
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.nn.layers import per_channel
from based_jax.nn.projections import Projected, by_device, device_pieces, into_stream, split, split_by_device
from based_jax.ops.projection import multiply


def head_dim(d_model: int, num_heads: int) -> int:
    """Return d_model / num_heads.

    Raises:
      UserError: the heads do not divide the width.
    """
    if num_heads < 1 or d_model % num_heads:
        raise UserError(f"d_model {d_model} cannot be divided into {num_heads} heads of equal size.")
    return d_model // num_heads


def split_heads(x: Float[Array, "*B D"], num_heads: int) -> Float[Array, "*B H K"]:
    """Cut the last axis into heads."""
    return einops.rearrange(x, "... (H K) -> ... H K", H=num_heads)


def merge_heads(x: Float[Array, "*B H V"]) -> Float[Array, "*B D"]:
    """Join the heads into the last axis."""
    return einops.rearrange(x, "... H V -> ... (H V)")


def to_heads(layer: nnx.Linear, x: Float[Array, "*B D"], num_heads: int, width: int) -> Float[Array, "*B H K"]:
    """Return a linear layer's output by head, each head's followed by zeros up to a width.

    They are columns of the kernel: zeros behind what comes out cost a GPU a copy of it, and of its gradient another.
    """
    if num_heads * width == layer.out_features:
        return split_heads(layer(x), num_heads)
    return _to_heads(layer, x, num_heads, width, lambda parameter: parameter)


def _to_heads(
    layer: nnx.Linear, x: Float[Array, "*B D"], num_heads: int, width: int, ordered: Callable[[Array], Array]
) -> Float[Array, "*B H K"]:
    """Return a linear layer's output by head, of parameters whose heads (..., H, K) are put in an order before."""

    def by_head(parameter: Array) -> Array:
        return with_zeros(ordered(split_heads(parameter, num_heads)), -1, width)

    kernel = parallel.constrain_channels(merge_heads(by_head(layer.kernel[...].astype(layer.dtype))))
    y = split_heads(multiply(x.astype(layer.dtype), kernel), num_heads)
    return y if layer.bias is None else y + per_channel(by_head(layer.bias[...]), y)


def split_to_heads(
    layer: nnx.Linear, x: Float[Array, "*B D"], heads: Sequence[int], width: int
) -> list[Float[Array, "*B _ K"]]:
    """Return the parts of `to_heads`, of so many heads; each device along "tensor" has its share of each part."""
    if (pieces := device_pieces(x, heads)) == 1:
        return split(to_heads(layer, x, sum(heads), width), np.cumsum(heads)[:-1].tolist(), -2)
    y = _to_heads(layer, x, sum(heads), width, lambda parameter: by_device(parameter, heads, pieces, -2))
    return split_by_device(y, heads, pieces, -2)


def from_heads(layer: nnx.Linear, o: Float[Array, "*B H V"]) -> Float[Array, "*B D"] | Projected:
    """Return a linear layer's output for heads that may end in zeros, as rows of its kernel then do; `into_stream`."""
    num_heads, width = o.shape[-2:]
    if num_heads * width == layer.in_features:
        return into_stream(layer, merge_heads(o))
    kernel = einops.rearrange(layer.kernel[...].astype(layer.dtype), "(H V) D -> H V D", H=num_heads)
    rows = einops.rearrange(with_zeros(kernel, 1, width), "H V D -> (H V) D")
    y = multiply(merge_heads(o).astype(layer.dtype), rows)
    return y if layer.bias is None else y + per_channel(layer.bias[...], y)


def with_zeros(x: Float[Array, "..."], axis: int, size: int) -> Float[Array, "..."]:
    """Return x with zeros behind it on an axis, up to a size."""
    fillers = [(0, 0)] * x.ndim
    fillers[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, fillers)


def rotary(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "T"] | Int[Array, "#B T"],
    dim: int,
    base: float,
    scaling: Callable[[Float[Array, "_"]], Float[Array, "_"]] = lambda frequencies: frequencies,
) -> Float[Array, "B T H K"]:
    """Rotate pairs (j, j + R/2) of the first R components by position * base^(-2j/dim); the others pass.

    An odd `dim` has ceil(dim/2) frequencies, so R is dim + 1 (flash-attention v2.5.2, as attn-1b uses it with 35).
    `scaling` makes others of these frequencies.
    """
    angles = rotary_angles(jnp.atleast_2d(positions), dim, base, scaling)[:, :, None]
    half = angles.shape[-1]
    cos, sin = (f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def rotary_angles(
    positions: Int[Array, "*B"],
    dim: int,
    base: float,
    scaling: Callable[[Float[Array, "_"]], Float[Array, "_"]] = lambda frequencies: frequencies,
) -> Float[Array, "*B half"]:
    """Return the angles by which `rotary` turns pairs at positions."""
    frequencies = scaling(base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / max(dim, 1)))
    return positions.astype(jnp.float32)[..., None] * frequencies.reshape(*(1,) * positions.ndim, -1)


def rotary_dim(head_dim: int, fraction: float) -> int:
    """Return the `dim` of `rotary` that turns a share of a head's components.

    Raises:
      UserError: these come in pairs, and the head has no other component for the last one.
    """
    dim = int(fraction * head_dim)
    if dim + dim % 2 > head_dim:
        raise UserError(
            f"A head has {head_dim} components; rotary turns pairs of them, so that {dim} cannot be turned."
        )
    return dim

"""Projections of one product: their parts, by device where channels are divided, and what few tokens take together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from based_jax import parallel
from based_jax.dims import BD
from based_jax.nn.layers import per_channel
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.few_tokens import few_tokens_gated, few_tokens_products
from based_jax.ops.projection import are_decoded, multiply, multiply_parts
from based_jax.ops.token_products import token_products, token_sums


def linear_part(layer: nnx.Linear, x: Float[Array, "*B D"], begin: int, end: int | None) -> Float[Array, "*B _"]:
    """Return the channels from `begin` to `end`, None for the last, of a linear layer, as one product.

    To cut the output of one product, and to join its gradient, costs a GPU more than several products do, if XLA does
    not join small ones itself (`xla_gpu_dot_merger_threshold_mb`).
    """
    assert (end or 0) <= layer.out_features
    kernel = parallel.constrain_channels(layer.kernel[...].astype(layer.dtype)[:, begin:end])
    y = multiply(x.astype(layer.dtype), kernel)
    return y if layer.bias is None else y + per_channel(layer.bias[...][begin:end], y)


def split_linear(layer: nnx.Linear, x: Float[Array, "*B D"], widths: Sequence[int]) -> list[Float[Array, "*B _"]]:
    """Return the parts, so wide, of a linear layer's output; each device along "tensor" has its share of each part."""
    if (pieces := device_pieces(x, widths)) == 1:
        return split(layer(x), np.cumsum(widths)[:-1].tolist())
    y, bias = joined_by_device(layer, x, widths)
    return split_by_device(y if bias is None else y + per_channel(bias, y), widths, pieces, -1)


def narrow_parts(layer: nnx.Linear, x: Float[Array, "*B D"], widths: Sequence[int]) -> list[Float[Array, "*B _"]]:
    """Return the parts, so wide, of the few channels of a linear layer without a bias, for tokens of a step."""
    return multiply_parts(x.astype(layer.dtype), layer.kernel[...].astype(layer.dtype), widths)


def joined_by_device(
    layer: nnx.Linear, x: Float[Array, "*B D"], widths: Sequence[int]
) -> tuple[Float[Array, "*B joint"], Float[Array, "joint"] | None]:
    """Return a linear layer's product without its bias, and the bias, in which each device along "tensor" has its
    share of every part, so wide, one after the other; of a step's tokens (B, D) they are in order.
    """
    kernel, bias = layer.kernel[...].astype(layer.dtype), layer.bias
    pieces = parallel.channel_pieces(*widths) if x.ndim > 2 else 1
    if pieces > 1:
        kernel = parallel.constrain_channels(by_device(kernel, widths, pieces, -1))
    y = multiply(x.astype(layer.dtype), kernel)
    return y, None if bias is None else by_device(bias[...], widths, pieces, -1)


def device_pieces(x: Float[Array, "*B D"], sizes: Sequence[int]) -> int:
    """Return over how many devices the parts of a product are ordered, 1 for a token of each row.

    What a layer returns of one token is small beside its kernel, which would be ordered anew for each few of them.
    """
    return parallel.channel_pieces(*sizes) if x.ndim > 2 and x.shape[-2] > 1 else 1


def by_device(x: Array, widths: Sequence[int], pieces: int, axis: int) -> Array:
    """Return channels in an order in which an equal share of each part follows that of the part before, for a device.

    As parameters hold them, one device would have one part and the next one another: what the layer returns, many
    times as large as the kernel, would be exchanged.
    """
    if pieces == 1:
        return x
    shape, axis = x.shape, axis % x.ndim
    parts = jnp.split(x, np.cumsum(widths)[:-1].tolist(), axis)
    shares = [y.reshape(*shape[:axis], pieces, -1, *shape[axis + 1 :]) for y in parts]
    return jnp.concatenate(shares, axis + 1).reshape(shape)


def split_by_device(y: Array, widths: Sequence[int], pieces: int, axis: int) -> list[Array]:
    """Return the parts of a product whose channels are ordered by device."""
    shape, axis = y.shape, axis % y.ndim
    of_device = y.reshape(*shape[:axis], pieces, -1, *shape[axis + 1 :])
    shares = split(of_device, (np.cumsum(widths)[:-1] // pieces).tolist(), axis + 1)
    return [x.reshape(*shape[:axis], -1, *shape[axis + 1 :]) for x in shares]


def split(y: Shaped[Array, "..."], sections: int | Sequence[int], axis: int = -1) -> list[Shaped[Array, "..."]]:
    """Return the parts of a product, as `jnp.split` does, whose gradient is joined from theirs once, as they are made.

    XLA would make the parts' gradients first, and then join them for each of the two products that read the sum of
    all: a barrier's gradient is a barrier. A decode step's tokens (B, D), which have none, are left to one kernel.
    """
    return jnp.split(y if y.ndim < 3 else lax.optimization_barrier(y), sections, axis)


def gated(layer: nnx.Linear, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
    """Return value * silu(gate) of the two halves of a linear layer's output; the layer has no bias."""
    if not are_decoded(x.shape):
        value, gate = split_linear(layer, x, [layer.out_features // 2] * 2)
        return value * jax.nn.silu(gate)
    x, kernel = layer.promote_dtype((x, layer.kernel[...]), dtype=layer.dtype)
    return few_tokens_gated(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


def several(parts: Sequence[nnx.Linear], x: Float[Array, "*B D"]) -> list[Float[Array, "*B _"]]:
    """Return the outputs of linear layers without a bias that compute in the same dtype; of few tokens together."""
    if not are_decoded(x.shape):
        return [layer(x) for layer in parts]
    x, *kernels = parts[0].promote_dtype((x, *(layer.kernel[...] for layer in parts)), dtype=parts[0].dtype)
    products = few_tokens_products(x.reshape(-1, x.shape[-1]), tuple(kernels))
    return [y.reshape(*x.shape[:-1], -1) for y in products]


def several_of_norm(
    parts: Sequence[nnx.Linear], norm: Any, r: BD, y: Pieces | None
) -> tuple[BD, list[Float[Array, "B _"]]]:
    """Return r + y of one sequence's token, and the outputs of linear layers without a bias for its norm."""
    kernels = tuple(layer.kernel[...].astype(layer.dtype) for layer in parts)
    return token_products(r, y, norm.scale[...], kernels, eps=norm.epsilon)


def in_pieces(layer: nnx.Linear, x: Float[Array, "B D"], marks: Int[Array, "_"] | None) -> Pieces:
    """Return the output of a linear layer without a bias for one sequence's token, with marks for what reads it."""
    return Pieces(token_sums(x.astype(layer.dtype), layer.kernel[...].astype(layer.dtype)), marks)


class Projected(NamedTuple):
    """What a linear layer returns for tokens (B, D), still to be computed: the norm that follows it does so.

    Attributes:
      x: the tokens, in the layer's dtype.
      kernel: (D, E), in the layer's dtype.
      bias: (E,), if there is one.
    """

    x: Float[Array, "B D"]
    kernel: Float[Array, "D E"]
    bias: Float[Array, "E"] | None

    def value(self) -> Float[Array, "B E"]:
        """Return it."""
        y = multiply(self.x, self.kernel)
        return y if self.bias is None else y + per_channel(self.bias, y)


def into_stream(layer: nnx.Linear, x: Float[Array, "*B D"]) -> Float[Array, "*B E"] | Projected:
    """Return a linear layer's output for the residual stream to add; of a decode step's tokens it is left to do."""
    if x.ndim != 2 or not are_decoded(x.shape):
        return layer(x)
    x, kernel = layer.promote_dtype((x, layer.kernel[...]), dtype=layer.dtype)
    return Projected(x, kernel, None if layer.bias is None else layer.bias[...])

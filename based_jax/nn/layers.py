"""Layers that every model shares, and the one place where dtypes and initial values are decided.

Parameters are fp32 masters. A layer computes in its `dtype` (bf16 on accelerators); norms, the residual stream,
softmax, recurrent states and the loss are fp32 whatever it is.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, override

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from based_jax import parallel
from based_jax.dims import BD, BP, DropoutKey
from based_jax.errors import UserError
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.few_tokens import few_tokens_gated, few_tokens_products
from based_jax.ops.projection import are_decoded, multiply, multiply_parts, project
from based_jax.ops.token_layer import token_mlp
from based_jax.ops.token_products import token_products, token_sums

INIT_STD = 0.02
NORM_EPS = 1e-5
LARGEST_SIZE = 2**31 - 1  # that an index can count


class Init(NamedTuple):
    """How a module starts and what it computes in: the one argument of mixers, MLPs and linear layers besides sizes.

    Attributes:
      std: deviation of the initial kernels.
      out_std: that of projections back into the residual stream.
      dtype: what the module computes in.
      rngs: where the initial values are drawn from.
      norm_eps: what the norms add to the variance.
    """

    std: float
    out_std: float
    dtype: Any
    rngs: nnx.Rngs
    norm_eps: float = NORM_EPS

    @property
    def out(self) -> "Init":
        """That of a projection back into the residual stream."""
        return self._replace(std=self.out_std)

    @property
    def fp32(self) -> "Init":
        """The same for a module that computes in fp32."""
        return self._replace(dtype=jnp.float32)

    @property
    def depth_gain(self) -> float:
        """1 / sqrt(L) for L layers, by which Mamba's reference shrinks torch's default on the way out; at most 1.

        `out_std` is `std` / sqrt(2 L).
        """
        return min(1.0, math.sqrt(2) * self.out_std / self.std)


def logical_axes(*names: str | None, parts: tuple[int, ...] = ()) -> dict:
    """Return variable metadata with a logical name for each axis, and the widths of `parts` joined along the last.

    `based_jax.parallel.shardings` turns names into shardings once a mesh is known; models need no mesh to be built.
    """
    return {"out_sharding": names, "eager_sharding": False} | ({"parts": parts} if parts else {})


class Linear(nnx.Linear):
    """A linear layer whose bias gets a gradient that is summed over the tokens in fp32, as `per_channel` says."""

    @override
    def __call__(self, inputs: Float[Array, "*B D"], out_sharding: Any = None) -> Float[Array, "*B _"]:
        inputs, kernel = self.promote_dtype((inputs, self.kernel[...]), dtype=self.dtype)
        contraction = (((inputs.ndim - 1,), (0,)), ((), ()))
        y = self.dot_general(inputs, kernel, contraction, precision=self.precision, out_sharding=out_sharding)
        return y if self.bias is None else y + per_channel(self.bias[...], y)


def linear(
    d_in: int,
    d_out: int,
    names: tuple[str | None, str | None],
    init: Init,
    *,
    bias: bool = False,
    parts: tuple[int, ...] = (),
) -> nnx.Linear:
    """Return a linear layer with kernel N(0, std^2), zero bias and the logical axis names of its kernel.

    `parts` are the widths of several maps in one product, such as queries, keys and values, for each of which an
    optimizer of matrices has an update of its own.
    """
    assert not parts or sum(parts) == d_out, f"{parts} are not {d_out} wide"
    return Linear(
        d_in,
        d_out,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(init.std),
        kernel_metadata=logical_axes(*names, parts=parts),
        bias_metadata=logical_axes(names[1]),
        dtype=init.dtype,
        dot_general=project,
        rngs=init.rngs,
    )


def torch_linear(
    d_in: int,
    d_out: int,
    names: tuple[str | None, str | None],
    init: Init,
    *,
    bias: bool = False,
    gain: float = 1.0,
    parts: tuple[int, ...] = (),
) -> nnx.Linear:
    """Return a linear layer with torch's default initial values, U(-1/sqrt(d_in), 1/sqrt(d_in)), times a gain."""
    layer = linear(d_in, d_out, names, init, bias=bias, parts=parts)
    bound = gain / math.sqrt(d_in)
    uniform = functools.partial(jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound)
    layer.kernel[...] = uniform(init.rngs.params(), (d_in, d_out))
    if layer.bias is not None:
        layer.bias[...] = uniform(init.rngs.params(), (d_out,))
    return layer


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
    if (pieces := _pieces(x, widths)) == 1:
        return split(layer(x), np.cumsum(widths)[:-1].tolist())
    y, bias = joined_by_device(layer, x, widths)
    return _split_by_device(y if bias is None else y + per_channel(bias, y), widths, pieces, -1)


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
        kernel = parallel.constrain_channels(_by_device(kernel, widths, pieces, -1))
    y = multiply(x.astype(layer.dtype), kernel)
    return y, None if bias is None else _by_device(bias[...], widths, pieces, -1)


def _pieces(x: Float[Array, "*B D"], sizes: Sequence[int]) -> int:
    """Return over how many devices the parts of a product are ordered, 1 for a token of each row.

    What a layer returns of one token is small beside its kernel, which would be ordered anew for each few of them.
    """
    return parallel.channel_pieces(*sizes) if x.ndim > 2 and x.shape[-2] > 1 else 1


def _by_device(x: Array, widths: Sequence[int], pieces: int, axis: int) -> Array:
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


def _split_by_device(y: Array, widths: Sequence[int], pieces: int, axis: int) -> list[Array]:
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


def per_channel(parameter: Float[Array, "..."], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Return a parameter over the last axes of x, the same for all tokens, in the dtype of x.

    It is rounded behind its way to the tokens, so that its gradient, on the way back, is summed over them in fp32: in
    bf16 a sum stops growing at 256 times what it adds.
    """
    shape = jnp.broadcast_shapes((1,) * (x.ndim - parameter.ndim) + parameter.shape, x.shape)
    return jnp.broadcast_to(parameter.astype(jnp.promote_types(parameter.dtype, jnp.float32)), shape).astype(x.dtype)


def at(positions: BP | None, *arrays: Shaped[Array, "B T ..."]) -> list[Shaped[Array, "B _ ..."]]:
    """Return arrays at P distinct positions of each sequence; None for all of them."""
    if positions is None:
        return list(arrays)
    rows = jnp.arange(positions.shape[0])[:, None]
    return [x.at[rows, positions].get(unique_indices=True, mode="promise_in_bounds") for x in arrays]


def dropout(x: Float[Array, "*B D"], rate: float, key: DropoutKey) -> Float[Array, "*B D"]:
    """Return x with a share of its components at 0, and the others over 1 - rate."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def rms_norm(d_model: int, eps: float, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Return RMSNorm in fp32 (HazyResearch/based:based/ops/triton/layer_norm.py)."""
    return nnx.RMSNorm(d_model, epsilon=eps, scale_metadata=logical_axes("embed"), rngs=rngs)


def layer_norm(d_model: int, eps: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return LayerNorm with bias in fp32."""
    return nnx.LayerNorm(
        d_model,
        epsilon=eps,
        use_fast_variance=False,
        scale_metadata=logical_axes("embed"),
        bias_metadata=logical_axes("embed"),
        rngs=rngs,
    )


NORMS = {"rms": rms_norm, "layer": layer_norm}


def conv_parameter(shape: tuple[int, ...], fan_in: int, *, rngs: nnx.Rngs) -> nnx.Param:
    """Return a parameter over channels, U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for a depthwise conv."""
    bound = 1 / math.sqrt(fan_in)
    values = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
    return nnx.Param(values, **logical_axes(*(None,) * (len(shape) - 1), "mlp"))


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


class SwiGLU(nnx.Module):
    """Gated MLP: fc2(value * silu(gate)) with (value, gate) = fc1(x), value first.

    Source: HazyResearch/based:based/models/mlp.py, `GatedMlp`.
    """

    def __init__(self, d_model: int, d_hidden: int, init: Init):
        self.fc1 = linear(d_model, 2 * d_hidden, ("embed", "mlp"), init, parts=(d_hidden, d_hidden))
        self.fc2 = linear(d_hidden, d_model, ("mlp", "embed"), init.out)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"] | Projected:
        """Apply to each token."""
        return into_stream(self.fc2, gated(self.fc1, x))

    def step_whole(self, r: BD, y: Pieces | None, norm: Any) -> tuple[BD, Pieces]:
        """Return r + y of one sequence's token, and the MLP of its norm, to be added next."""
        kernels = (layer.kernel[...].astype(layer.dtype) for layer in (self.fc1, self.fc2))
        return token_mlp(r, y, norm.scale[...], *kernels, eps=norm.epsilon)


class GELU(nnx.Module):
    """MLP with biases: fc2(gelu(fc1(x))), the exact GELU (arXiv 1606.08415).

    Source: HazyResearch/zoology:zoology/mixers/mlp.py, `MLP`.
    """

    def __init__(self, d_model: int, d_hidden: int, init: Init):
        self.fc1 = linear(d_model, d_hidden, ("embed", "mlp"), init, bias=True)
        self.fc2 = linear(d_hidden, d_model, ("mlp", "embed"), init.out, bias=True)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Apply to each token."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Identity(nnx.Module):
    """No MLP, as in zoology's MQAR models: the block then adds its second norm's output to the residual."""

    def __init__(self, d_model: int, d_hidden: int, init: Init):
        pass

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Return x."""
        return x


MLPS = {"swiglu": SwiGLU, "gelu": GELU, "identity": Identity, "none": None}


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


def scaled(name: str, width: int, factor: float) -> int:
    """Return width * factor, rounded down.

    Raises:
      UserError: nothing is left, or more than an index can count; `name` is that of the factor.
    """
    if not 1 <= width * factor <= LARGEST_SIZE:
        raise UserError(f"{name} is {factor}; times {width} it is a width between 1 and {LARGEST_SIZE}.")
    return int(width * factor)


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
    if (pieces := _pieces(x, heads)) == 1:
        return split(to_heads(layer, x, sum(heads), width), np.cumsum(heads)[:-1].tolist(), -2)
    y = _to_heads(layer, x, sum(heads), width, lambda parameter: _by_device(parameter, heads, pieces, -2))
    return _split_by_device(y, heads, pieces, -2)


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

"""Layers that every model shares, and the one place where dtypes and initial values are decided.

Parameters are fp32 masters. A layer computes in its `dtype` (bf16 on accelerators); norms, the residual stream,
softmax, recurrent states and the loss are fp32 whatever it is.
"""

import functools
import math
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from based_jax.dims import BP, DropoutKey
from based_jax.errors import UserError
from based_jax.ops.projection import project

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


def scaled(name: str, width: int, factor: float) -> int:
    """Return width * factor, rounded down.

    Raises:
      UserError: nothing is left, or more than an index can count; `name` is that of the factor.
    """
    if not 1 <= width * factor <= LARGEST_SIZE:
        raise UserError(f"{name} is {factor}; times {width} it is a width between 1 and {LARGEST_SIZE}.")
    return int(width * factor)

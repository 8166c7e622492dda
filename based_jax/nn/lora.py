"""Low-rank adapters (LoRA, arXiv 2106.09685): kernels that are kept, each with a product of two thin matrices added.

    W' = W + (alpha / r) A B        A (d_in, r) ~ N(0, 1 / d_in), B (r, d_out) = 0

Kernels are chosen by patterns of their path, such as "*/mixer/qkv/kernel"; those of layers that are stacked have
adapters that are stacked. Adapters are a tree of arrays by path, apart from the model, which they are merged into.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.errors import UserError
from based_jax.optim import path_of


class Adapter(NamedTuple):
    """What is added to a kernel (..., d_in, d_out): A (..., d_in, r) and B (..., r, d_out)."""

    a: Float[Array, "*L D r"]
    b: Float[Array, "*L r F"]


Adapters = Mapping[str, Adapter]


def adapters(params: Any, patterns: Sequence[str], rank: int, key: Array) -> dict[str, Adapter]:
    """Return adapters by path, which add nothing at first.

    Args:
      params: an `nnx.State` of parameters.
      patterns: of the paths of kernels, as `fnmatch` has them.
      rank: r.
      key: that A is drawn from.

    Raises:
      UserError: the rank is below 1, or a pattern matches no kernel.
    """
    if rank < 1:
        raise UserError(f"rank is {rank}; it is at least 1.")
    kernels = {path: leaf for path, leaf in by_path(params).items() if path.endswith("/kernel")}
    for pattern in patterns:
        if not fnmatch.filter(kernels, pattern):
            raise UserError(f"'{pattern}' matches no kernel; there are {', '.join(sorted(kernels))}.")
    chosen = sorted({path for pattern in patterns for path in fnmatch.filter(kernels, pattern)})
    keys = jax.random.split(key, len(chosen))
    return {path: _adapter(kernels[path], rank, own) for path, own in zip(chosen, keys, strict=True)}


def _adapter(kernel: Array, rank: int, key: Array) -> Adapter:
    *stacked, d_in, d_out = kernel.shape
    a = jax.random.normal(key, (*stacked, d_in, rank)) / d_in**0.5
    return Adapter(a, jnp.zeros((*stacked, rank, d_out)))


def merged(params: Any, found: Adapters, alpha: float = 16.0) -> Any:
    """Return the parameters with what adapters add; gradients reach these and the parameters.

    Args:
      params: an `nnx.State`, or any tree of parameters.
      found: adapters by path.
      alpha: what is added is alpha / r times A B.

    Raises:
      UserError: an adapter's path is no parameter's.
    """
    if missing := sorted(set(found) - set(by_path(params))):
        raise UserError(f"There is an adapter for '{missing[0]}', which is no parameter's path.")

    def add(keys: Any, leaf: Array) -> Array:
        if (adapter := found.get(path_of(keys))) is None:
            return leaf
        scale = alpha / adapter.a.shape[-1]
        return leaf + scale * jnp.matmul(adapter.a, adapter.b, precision="highest").astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(add, params)


def by_path(params: Any) -> dict[str, Array]:
    """Return the arrays of a tree by their paths."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}


def replaced(params: Any, values: Mapping[str, Array]) -> Any:
    """Return the tree with other arrays at some paths."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: values.get(path_of(keys), leaf), params)

"""Moments of an optimizer in half the bytes: kept in bf16, computed in fp32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from based_jax.optim.groups import updates_taken

DROPPED_BITS = np.uint32(0xFFFF)
"""Of a number in fp32, those that bf16 has not."""


def kept_in(dtype: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return an optimizer whose moments are kept in a dtype between its updates, which see them in fp32.

    Args:
      dtype: "float32" or "bfloat16".
      tx: its state has a count of its updates, from which random bits are drawn.
    """
    if dtype == "float32":
        return tx

    def init(params: Any) -> Any:
        return _map_moments(lambda x: x.astype(dtype), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, _map_moments(lambda x: x.astype(jnp.float32), state), params)
        return updates, _rounded(state)

    return optax.GradientTransformation(init, update)


def stochastically_rounded(x: Float[Array, "..."], key: jax.Array) -> Float[Array, "..."]:
    """Return fp32 numbers in bf16, each one of its two neighbours there, such that the mean is the number.

    Rounded to the nearest, a moment would stay what it is where one update changes it by less than a bf16 step, 0.4 %.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    cut = jax.lax.bitcast_convert_type(bits & ~DROPPED_BITS, jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _rounded(state: Any) -> Any:
    key = jax.random.fold_in(jax.random.key(0), updates_taken(state))
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(key, len(leaves))
    rounded = [
        _map_moments(functools.partial(stochastically_rounded, key=own), leaf)
        for leaf, own in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, rounded)


def _map_moments(call: Callable[[jax.Array], jax.Array], state: Any) -> Any:
    """Return a state with its floating-point arrays mapped; its counts are whole numbers."""
    return jax.tree.map(lambda x: call(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

"""Moments of an optimizer in half the bytes: kept in bf16, computed in fp32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt32

from based_jax.optim.groups import updates_taken

DROPPED_BITS = np.uint32(0xFFFF)
"""Of a number in fp32, those that bf16 has not."""
SCRAMBLE = (16, np.uint32(0x85EBCA6B)), (13, np.uint32(0xC2B2AE35)), (16, np.uint32(1))
"""Shifts and factors that make any bit of 32 depend on all (MurmurHash3's `fmix32`)."""


def kept_in(dtype: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return an optimizer whose moments are kept in a dtype between its updates, which see them in fp32.

    Args:
      dtype: "float32" or "bfloat16".
      tx: its state has a count of its updates, which seeds the rounding.
    """
    if dtype == "float32":
        return tx

    def init(params: Any) -> Any:
        return _map_moments(lambda x: x.astype(dtype), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, _map_moments(lambda x: x.astype(jnp.float32), state), params)
        return updates, _rounded(state)

    return optax.GradientTransformation(init, update)


def stochastically_rounded(x: Float[Array, "..."], seed: UInt32[Array, ""]) -> Float[Array, "..."]:
    """Return fp32 numbers in bf16, each one of its two neighbours there, such that the mean over seeds is the number.

    Rounded to the nearest, a moment would stay what it is where one update changes it by less than a bf16 step, 0.4 %.
    A number's place and the seed decide, scrambled, which costs little and is the same however an array is divided.
    """
    bits, chance = jax.lax.bitcast_convert_type(x, jnp.uint32), jnp.broadcast_to(_scrambled(seed), x.shape)
    for dimension in range(x.ndim):
        chance = _scrambled(chance + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension))
    carried = bits + (_scrambled(chance) & DROPPED_BITS)
    cut = jax.lax.bitcast_convert_type(carried & ~DROPPED_BITS, jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _scrambled(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    for shift, factor in SCRAMBLE:
        bits = (bits ^ (bits >> shift)) * factor
    return bits


def _rounded(state: Any) -> Any:
    leaves, structure = jax.tree.flatten(state)
    first = updates_taken(state).astype(jnp.uint32) * len(leaves)
    rounded = [
        _map_moments(functools.partial(stochastically_rounded, seed=first + place), leaf)
        for place, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, rounded)


def _map_moments(call: Callable[[jax.Array], jax.Array], state: Any) -> Any:
    """Return a state with its floating-point arrays mapped; its counts are whole numbers."""
    return jax.tree.map(lambda x: call(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

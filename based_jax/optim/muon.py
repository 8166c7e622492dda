"""Muon: the momentum of each matrix, made orthogonal (Jordan et al., https://kellerjordan.github.io/posts/muon/)."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from based_jax.optim.config import MuonConfig
from based_jax.optim.groups import is_variable, parts_of

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of x, x x^T x and (x x^T)^2 x: five times over, singular values above 0.01 come near 1, and none beyond 1.3."""
SMALLEST_NORM = 1e-8


def scale_by_muon(config: MuonConfig) -> optax.GradientTransformation:
    """Return Nesterov's momentum, made orthogonal for each matrix and scaled to `update_rms`.

    A kernel's matrices are over its last two axes: stacked layers each have their own, and so has each map that a
    kernel joins (queries, keys and values; value and gate), as in Megatron-LM and as Muon's authors advise.
    """

    def orthogonal(leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(_orthogonal_parts(leaf.get_value(), parts_of(leaf), config)) if _is_array(leaf) else leaf

    def update(momentum: Any, _: Any) -> Any:
        return jax.tree.map(orthogonal, momentum, is_leaf=is_variable)

    return optax.chain(optax.trace(config.momentum, nesterov=True), optax.stateless(update))


def orthogonalized(x: Float[Array, "*L M N"], steps: int) -> Float[Array, "*L M N"]:
    """Return U S V^T for x = U _ V^T, matrix by matrix, with all of S near 1.

    Args:
      x: matrices of any scale; one of zeros stays what it is.
      steps: iterations of `NEWTON_SCHULZ`.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalized(x.mT, steps).mT
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + SMALLEST_NORM)
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x


def _orthogonal_parts(x: Float[Array, "*L M N"], parts: tuple[int, ...], config: MuonConfig) -> Float[Array, "*L M N"]:
    ends = list(itertools.accumulate(parts[:-1]))
    return jnp.concatenate([_update(part, config) for part in jnp.split(x, ends, axis=-1)], axis=-1)


def _update(x: Float[Array, "*L M N"], config: MuonConfig) -> Float[Array, "*L M N"]:
    """Return matrices orthogonalized; an orthogonal one has a root mean square of 1 / sqrt(max(M, N))."""
    return config.update_rms * math.sqrt(max(x.shape[-2:])) * orthogonalized(x, config.steps)


def _is_array(leaf: nnx.Variable) -> bool:
    """Return whether a variable has an array, rather than what stands for one that another optimizer has."""
    return hasattr(leaf.get_value(), "shape")

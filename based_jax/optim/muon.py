"""Muon: the momentum of each matrix, made orthogonal (Jordan et al., https://kellerjordan.github.io/posts/muon/)."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from based_jax.optim.config import MuonConfig
from based_jax.optim.groups import axes_of, is_variable, parts_of
from based_jax.placement import by_rows

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of x, x x^T x and (x x^T)^2 x: five times over, singular values above 0.01 come near 1, and none beyond 1.3."""
SMALLEST_NORM = 1e-8

Matrices = Float[Array, "*L M N"]
Axes = tuple[str | None, ...]


def scale_by_muon(config: MuonConfig) -> optax.GradientTransformation:
    """Return Nesterov's momentum, made orthogonal for each matrix and scaled to `update_rms`.

    A kernel's matrices are over its last two axes: stacked layers each have their own, and so has each map that a
    kernel joins (queries, keys and values; value and gate), as in Megatron-LM and as Muon's authors advise.
    """

    def update(momentum: Any, _: Any) -> Any:
        leaves, structure = jax.tree.flatten(momentum, is_leaf=is_variable)
        kernels = [leaf for leaf in leaves if hasattr(leaf.get_value(), "shape")]  # AdamW has the others
        parts = [_parts(kernel) for kernel in kernels]
        axes = [axes_of(kernel)[-2:] for kernel, own in zip(kernels, parts, strict=True) for _ in own]
        made = iter(orthogonalized(list(itertools.chain(*parts)), axes, config.steps))
        updates = {id(kernel): kernel.replace(_joined(kernel, made, config.update_rms)) for kernel in kernels}
        return jax.tree.unflatten(structure, [updates.get(id(leaf), leaf) for leaf in leaves])

    return optax.chain(optax.trace(config.momentum, nesterov=True), optax.stateless(update))


def orthogonalized(matrices: Sequence[Matrices], axes: Sequence[Axes], steps: int) -> list[Matrices]:
    """Return U S V^T for each x = U _ V^T, with all of S near 1.

    Those that are alike, some of them transposed, are a batch, which a mesh (`jax.set_mesh`) has over all its devices:
    no product is of a part of a matrix, and none is made twice.

    Args:
      matrices: of any scale; one of zeros stays what it is.
      axes: the names of their rows and columns, which those of a batch share, since these lie on a mesh by them.
      steps: iterations of `NEWTON_SCHULZ`.
    """
    tall = [_is_tall(x, names) for x, names in zip(matrices, axes, strict=True)]
    wide = [x.mT if turned else x for x, turned in zip(matrices, tall, strict=True)]
    kinds = [
        (x.shape[-2:], names[::-1] if turned else names) for x, names, turned in zip(wide, axes, tall, strict=True)
    ]
    found: dict[int, Array] = {}
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        rows = [wide[i].reshape(-1, *kind[0]) for i in places]
        ends = list(itertools.accumulate(map(len, rows)))
        done = by_rows(lambda x: newton_schulz(x, steps), jnp.concatenate(rows))
        found |= dict(zip(places, jnp.split(done, ends[:-1]), strict=True))
    whole = [found[i].reshape(x.shape) for i, x in enumerate(wide)]
    return [x.mT if turned else x for x, turned in zip(whole, tall, strict=True)]


def newton_schulz(x: Float[Array, "B M N"], steps: int) -> Float[Array, "B M N"]:
    """Return a batch of wide matrices after so many iterations towards orthogonal ones."""
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + SMALLEST_NORM)
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x


def _is_tall(x: Matrices, axes: Axes) -> bool:
    """Return whether matrices have more rows than columns, or as many and the stream's axis last."""
    rows, columns = x.shape[-2:]
    return rows > columns or (rows == columns and axes[-1:] == ("embed",))


def _parts(kernel: Any) -> list[Matrices]:
    return jnp.split(kernel.get_value(), list(itertools.accumulate(parts_of(kernel)[:-1])), axis=-1)


def _joined(kernel: Any, parts: Any, rms: float) -> Matrices:
    """Return the next matrices of an iterator as the parts of a kernel, scaled to a root mean square.

    That of an orthogonal one is 1 / sqrt(max(M, N)).
    """
    own = list(itertools.islice(parts, max(len(parts_of(kernel)), 1)))
    return jnp.concatenate([rms * math.sqrt(max(x.shape[-2:])) * x for x in own], axis=-1)

"""How far results are from the oracle's, and both passes of a function as one."""

import math
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 5e-3
ROW_TOLERANCE = 0.25
NEARBY_TOKENS = 16
"""Tokens on either side whose rows tell how large a row might be."""
GRADIENT_FLOOR = 1e-3
"""Of an input's root mean square: a gradient that vanishes, as of a document's only token, may be off by so much."""


def both_passes(function: Callable) -> Callable:
    """Return a function of (outputs' gradients, arrays, ids) that returns all outputs, and `d...` for each array.

    Outputs whose gradients are not given have none: they are not taken to be zero.
    """

    def run(gradients, arrays, ids):
        def chosen(arrays):
            out = function(arrays, ids)
            return {name: out[name] for name in gradients}, out

        _, pull, out = jax.vjp(chosen, arrays, has_aux=True)
        [found] = pull(gradients)
        return out | {f"d{name}": x for name, x in found.items()}

    return run


def forward_alone(function: Callable) -> Callable:
    """Return the same for a function that has no gradients: all outputs."""
    return lambda _gradients, arrays, ids: function(arrays, ids)


def by_rows(passes: Callable, weights: Collection[str]) -> Callable:
    """Return `both_passes` or `forward_alone` of a function, each row of the batch by itself.

    Beside the results it returns how large each weight's gradient, the sum of the rows', would be if these did not
    cancel: the root mean square of its elements.
    """
    summed = {f"d{name}" for name in weights}

    def run(gradients, arrays, ids):
        def row(gradients, arrays, ids):
            one = {name: x if name in weights else x[None] for name, x in arrays.items()}
            found = passes({name: x[None] for name, x in gradients.items()}, one, ids[None])
            return {name: x if name in summed else x[0] for name, x in found.items()}

        found = jax.vmap(row, (0, {name: None if name in weights else 0 for name in arrays}, 0))(gradients, arrays, ids)
        sizes = {name: jnp.sqrt((found[name] ** 2).sum(0).mean()) for name in summed & set(found)}
        return {name: x.sum(0) if name in summed else x for name, x in found.items()}, sizes

    return run


def judged(row: dict) -> dict:
    """Return a row of measured errors with its verdict."""
    fine = all(x < TOLERANCE for x in row["errors"].values()) and all(x < ROW_TOLERANCE for x in row["rows"].values())
    return row | {"passed": bool(fine and row["finite"] and row["same_bits"])}


def cropped(wanted: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the part of an oracle's result that is no padding."""
    return wanted[tuple(map(slice, shape))]


def floors(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the least size of an element of each array's gradient that errors are measured against."""
    squares = {name: float(np.mean(np.asarray(x, np.float64) ** 2)) for name, x in arrays.items()}
    return {f"d{name}": GRADIENT_FLOOR * math.sqrt(x) for name, x in squares.items()}


def error(got: np.ndarray, wanted: np.ndarray, floor: float = 0.0) -> float:
    """Return the norm of the difference over the norm of what is wanted; infinite where it is no number.

    `floor` is the least root mean square that what is wanted counts for.
    """
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    return _ratio(np.linalg.norm(got - wanted), max(np.linalg.norm(wanted), floor * np.sqrt(wanted.size)))


def error_of_rows(got: np.ndarray, wanted: np.ndarray, floor: float = 0.0) -> float:
    """Return the largest error of a token's row of a (B, T, ..., width) array, over the larger of two norms.

    One is its own, one the root mean square of the rows about it: where a row cancels, as that of a first token's dq
    does, its error is that of what cancels. Sequences too short to have rows about them share theirs. `floor` is as in
    `error`.
    """
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    norms, off = (np.linalg.norm(x, axis=-1) for x in (wanted, got - wanted))
    squares = np.cumsum((norms**2).reshape(*norms.shape[:2], -1).mean(axis=2), axis=1)
    squares = np.pad(squares, ((0, 0), (1, 0)))
    places = np.arange(norms.shape[1])
    begin, end = np.maximum(places - NEARBY_TOKENS, 0), np.minimum(places + NEARBY_TOKENS + 1, len(places))
    near = np.sqrt(np.maximum(squares[:, end] - squares[:, begin], 0) / (end - begin))
    if len(places) <= NEARBY_TOKENS:
        near = np.broadcast_to(np.sqrt(np.mean(near**2, axis=0)), near.shape)
    scale = np.maximum(norms, near.reshape(*near.shape, *(1,) * (norms.ndim - 2)))
    scale = np.maximum(scale, floor * np.sqrt(wanted.shape[-1]))
    relative = np.divide(off, scale, out=np.where(off == 0, 0, np.inf), where=scale > 0)
    return float(np.nan_to_num(relative, nan=np.inf, posinf=np.inf).max())


def _ratio(off: float, norm: float) -> float:
    """Return off / norm with 0 / 0 = 0."""
    if off == 0:
        return 0.0
    ratio = float(off / norm) if norm > 0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf


def finite(x: np.ndarray) -> bool:
    """Return whether every element is a finite number."""
    return bool(np.isfinite(np.asarray(x, np.float32)).all())


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Return whether two arrays are the same, byte by byte."""
    first, second = (np.ascontiguousarray(z).view(np.uint8) for z in (x, y))
    return np.array_equal(first, second)

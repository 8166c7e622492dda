"""Spaces of points: a point is a flat dict from dotted config keys to values, a space a list of points."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from based_jax.errors import UserError

Point = dict[str, Any]
Space = list[Point]


def param(key: str, values: Iterable[Any]) -> Space:
    """Return one point for each value of a config key, such as "optim.lr"."""
    space = [{key: value} for value in values]
    if not space:
        raise UserError(f"param '{key}' has no values; give at least one.")
    return space


def product(*spaces: Space) -> Space:
    """Return every combination of a point of each space; the last space varies fastest."""
    return [_merged(points) for points in itertools.product(*spaces)]


def chain(*spaces: Space) -> Space:
    """Return the points of all spaces, one space after the other."""
    return [dict(point) for space in spaces for point in space]


def zipped(*spaces: Space) -> Space:
    """Return the first points of all spaces together, then the second ones, and so on."""
    lengths = [len(space) for space in spaces]
    if len(set(lengths)) > 1:
        raise UserError(f"zipped takes spaces of one length, not of {', '.join(map(str, lengths))}.")
    return [_merged(points) for points in zip(*spaces, strict=True)]


def _merged(points: Sequence[Point]) -> Point:
    merged: Point = {}
    for point in points:
        twice = merged.keys() & point.keys()
        if twice:
            raise UserError(f"Config key '{min(twice)}' is set by two of the combined spaces; set it in one.")
        merged |= point
    return merged

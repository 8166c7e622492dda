"""Spaces of points: a point is a flat dict from dotted config keys to values, a space a list of points."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from based_jax.errors import UserError
from based_jax.nn.mixers import Mixer, kind_of

MAX_CHARACTERS_SHOWN = 200

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


def checked_point(point: Any) -> Point:
    """Return a point with arrays and numbers of numpy as lists and numbers of Python, mixers' classes as names.

    Raises:
      UserError: it is no dict from config keys to values that JSON can hold, or a section comes after a key inside it.
    """
    if not isinstance(point, Mapping) or not all(key and isinstance(key, str) for key in point):
        raise UserError(f"A point of a sweep is {shown(point)}; it is a dict from config keys to values.")
    for first, second in itertools.combinations(point, 2):
        if first.startswith(f"{second}."):
            raise UserError(f"Config key '{first}' of a point is overwritten by its '{second}'; set it in one of them.")
    values = {key: _plain(value) for key, value in point.items()}
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"A point of a sweep is {shown(point)}, which JSON cannot hold: {error}.") from None
    return values


def shown(value: Any) -> str:
    """Return a value in one line of print that is not too long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of an object that is none of ours
        return f"of type {type(value).__name__}"
    return text if len(text) <= MAX_CHARACTERS_SHOWN else f"{text[:MAX_CHARACTERS_SHOWN]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping | ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_plain, value)] if isinstance(value, list) else (*map(_plain, value),)
    if isinstance(value, type) and issubclass(value, Mixer):
        return kind_of(value)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _merged(points: Sequence[Point]) -> Point:
    merged: Point = {}
    for point in points:
        twice = merged.keys() & point.keys()
        if twice:
            raise UserError(f"Config key '{min(twice)}' is set by two of the combined spaces; set it in one.")
        merged |= point
    return merged

"""Shapes and types of arrays, checked at each call of a function that declares them."""

import functools
import inspect
from collections.abc import Sequence
from typing import get_args

import jaxtyping

_check = jaxtyping.jaxtyped


def check_shapes(modules: Sequence[str]) -> None:
    """Check what functions of modules, imported from now on, take and return, wherever they declare an array.

    jaxtyping's hook wraps all functions, which takes 1 ms for each closure whenever it is made; of types that are no
    arrays mypy has a better view.
    """
    jaxtyping.jaxtyped = _check_arrays
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def _check_arrays(function=None, *, typechecker):
    if function is None:
        return functools.partial(_check_arrays, typechecker=typechecker)
    if inspect.isfunction(function) and not any(map(_has_array, function.__annotations__.values())):
        return function
    return _check(function, typechecker=typechecker)


def _has_array(annotation) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return isinstance(annotation, str) or any(map(_has_array, get_args(annotation)))

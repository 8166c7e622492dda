"""The door of every operation: arguments are what their annotations say, or a sentence says which is not.

`@checked` reads the annotations that a function has anyway: arrays by dtype and by the letters of their dimensions,
each of which has one size in a call, and static values by type. It costs time when a program is traced, and none later.
"""

import functools
import inspect
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray, Key, Shaped

from based_jax.errors import UserError

Sizes = dict[str, int | tuple[int, ...]]


def checked[F: Callable](operation: F) -> F:
    """Return an operation that refuses arguments other than its annotations say; arrays of numpy become JAX's.

    The operation may raise UserErrors of its own for what no annotation says.
    """
    signature, hints = inspect.signature(operation), typing.get_type_hints(operation)

    @functools.wraps(operation)
    def at_the_door(*args: Any, **options: Any) -> Any:
        given, sizes = signature.bind(*args, **options), cast(Sizes, {})
        for name, value in given.arguments.items():
            if name in hints and signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                given.arguments[name] = _argument(operation.__qualname__, name, value, hints[name], sizes)
        return operation(*given.args, **given.kwargs)

    return cast(F, at_the_door)


def _argument(operation: str, name: str, value: Any, hint: Any, sizes: Sizes) -> Any:
    """Return an argument as its operation wants it."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in members:
        return None
    kind = next((x for x in members if hasattr(x, "_fields") and isinstance(value, x)), members[0])
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return _array(operation, name, value, kind, sizes)
    if isinstance(kind, type) and hasattr(kind, "_fields"):
        return _fields(operation, name, value, kind, sizes)
    return _STATIC.get(kind, lambda *_: value)(operation, name, value)


def _array(operation: str, name: str, value: Any, kind: Any, sizes: Sizes) -> jax.Array:
    if isinstance(value, np.ndarray | np.generic):
        value = _of_numpy(operation, name, value)
    if isinstance(value, jax.Array) and re.fullmatch(r"(float[48]|u?int[24](?!\d)).*", value.dtype.name):
        raise UserError(f"{operation}: {name} is {value.dtype.name}, which JAX promotes to no other dtype; convert it.")
    if isinstance(value, jax.Array) and _is_of(value.dtype, kind) and _fit(value.shape, kind.dim_str, sizes):
        if _lacks(value.shape, kind.dim_str):
            raise UserError(f"{operation}: {name} is {value.shape}; none of its axes but the batch may be empty.")
        return value
    letters = kind.dim_str.split()
    known = ", ".join(f"{x} = {sizes[x]}" for x in (letter.removeprefix("#") for letter in letters) if x in sizes)
    dims = ", ".join(f"{letter[1:]} or 1" if letter.startswith("#") else letter for letter in letters)
    what = f"{value.dtype.name} {value.shape}" if isinstance(value, jax.Array) else _shown(value)
    noun = _NOUNS.get(kind.dtype.__name__, "an array")
    raise UserError(f"{operation}: {name} is {what}; it is {noun} ({dims}){', with ' + known if known else ''}.")


def _of_numpy(operation: str, name: str, value: np.ndarray | np.generic) -> Any:
    """Return an array of JAX's, or the value where there is none of it: strings, objects, dates, masked arrays."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        return value
    if value.dtype.kind in "iu" and array.dtype.itemsize < value.dtype.itemsize and value.size:
        held = jnp.iinfo(array.dtype)
        for extreme in (value.min(), value.max()):
            if not held.min <= extreme <= held.max:
                raise UserError(f"{operation}: {name} has {extreme}; it is from {held.min} to {held.max}.")
    return array


def _is_of(dtype: Any, kind: Any) -> bool:
    if kind.dtype is Key:
        return jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return kind.dtype is Shaped or dtype.name in kind.dtypes


def _fit(shape: tuple[int, ...], dims: str, sizes: Sizes) -> bool:
    """Return whether a shape is of these dimensions, and enter the sizes of letters that are new."""
    letters = dims.split()
    if letters and letters[0].startswith("*"):
        variadic, letters = letters[0], letters[1:]
        split = len(shape) - len(letters)
        if split < 0 or sizes.setdefault(variadic, shape[:split]) != shape[:split]:
            return False
        shape = shape[split:]
    return len(shape) == len(letters) and all(map(functools.partial(_fits, sizes=sizes), shape, letters))


def _lacks(shape: tuple[int, ...], dims: str) -> bool:
    """Return whether an axis of a shape that fits is empty, other than one of the batch."""
    letters = [letter for letter in dims.split() if not letter.startswith("*")]
    return any(size == 0 and letter != "B" for size, letter in zip(shape[::-1], letters[::-1], strict=False))


def _fits(size: int, letter: str, sizes: Sizes) -> bool:
    """Return whether a size is that of a dimension: a number, a letter, a letter + 1, or #letter, which may be 1.

    Others are the operation's to check.
    """
    base, _, more = letter.removeprefix("#").partition("+")
    if base.isdigit():
        return size == int(base)
    if letter == "_" or not base.isidentifier() or (letter.startswith("#") and size == 1):
        return True
    return sizes.setdefault(base, size - int(more or 0)) == size - int(more or 0)


def _fields(operation: str, name: str, value: Any, kind: Any, sizes: Sizes) -> Any:
    """Return a state that is a NamedTuple, each of its arrays checked."""
    hints: Mapping[str, Any] = typing.get_type_hints(kind)
    if not isinstance(value, tuple) or len(value) != len(hints):
        raise UserError(
            f"{operation}: {name} is {type(value).__name__}; it is a {kind.__name__} of {', '.join(hints)}."
        )
    arrays = zip(hints.items(), value, strict=True)
    return kind(*(_argument(operation, f"{name}.{field}", x, hint, sizes) for (field, hint), x in arrays))


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {' '.join(repr(value).split()):.40}"


def _integer(operation: str, name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool | np.bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UserError(f"{operation}: {name} is {_shown(value)}; it is an int.")


def _number(operation: str, name: str, value: Any) -> Any:
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        if not isinstance(value, bool | np.bool | str | bytes) and math.isfinite(value):
            return float(value) if isinstance(value, int) else value
    except (TypeError, OverflowError):
        pass
    raise UserError(f"{operation}: {name} is {_shown(value)}; it is a finite number.")


def _truth(operation: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool):
        raise UserError(f"{operation}: {name} is {_shown(value)}; it is True or False.")
    return bool(value)


def _word(operation: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{operation}: {name} is {_shown(value)}; it is a string.")
    return value


def _tuple(operation: str, name: str, value: Any) -> tuple:
    if not isinstance(value, tuple):
        raise UserError(f"{operation}: {name} is {_shown(value)}; it is a tuple.")
    return value


_STATIC: Mapping[Any, Callable[[str, str, Any], Any]] = {
    int: _integer,
    float: _number,
    bool: _truth,
    str: _word,
    tuple: _tuple,
}
_NOUNS = {
    "Float": "an array of floats",
    "Integer": "an array of ints",
    "Int": "an array of ints",
    "Complex": "a complex array",
    "Bool": "an array of booleans",
    "Key": "a key of jax.random",
}

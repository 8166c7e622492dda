"""Mixers that `MIXERS` lacks: classes that stand in a layer list themselves, and what rows and files call them."""

import dataclasses
import hashlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

from based_jax.errors import UserError
from based_jax.nn.mixer import Mixer

MARK = "@"
"""Between a class's name and the digits of its source; no key of `MIXERS` has it."""
CONSTANTS = (int, float, complex, str, bytes, tuple, frozenset, type(None))


class OwnMixer(str):
    """What a layer of a mixer from outside the package is called: "Ema@3f2a91c0", a str that knows its class.

    The digits are of the class's source and of what it uses of its own module: a mixer that was changed is another
    one, in ids of runs and rows too. In JSON only the name is left, from which no class can be had.
    """

    mixer: type[Mixer]

    def __new__(cls, mixer: type[Mixer]):
        """Return the name of a class.

        Raises:
          UserError: it is no complete mixer.
        """
        check_complete(mixer)
        found = super().__new__(cls, f"{mixer.__name__}{MARK}{fingerprint(mixer)}")
        found.mixer = mixer
        return found

    def __reduce__(self):
        return OwnMixer, (self.mixer,)


def is_own(kind: str) -> bool:
    """Return whether a layer's kind is the name of a mixer from outside the package."""
    return MARK in kind


def short(kind: str) -> str:
    """Return a kind as people are told it: of a mixer from outside the class's name alone."""
    return kind.partition(MARK)[0]


def check_complete(mixer: type) -> None:
    """Raise UserError for a class that is no mixer, or lacks a part of one."""
    if not issubclass(mixer, Mixer):
        raise UserError(f"The class {mixer.__name__} is no mixer; it is a subclass of based_jax.nn.mixer.Mixer.")
    config: Any = getattr(mixer, "Config", None)
    if not dataclasses.is_dataclass(config) or not config.__dataclass_params__.frozen:  # type: ignore[union-attr]
        raise UserError(f"The mixer {mixer.__name__} has no Config; it is a frozen dataclass, whose defaults hold.")
    if lacking := sorted(getattr(mixer, "__abstractmethods__", ())):
        raise UserError(f"The mixer {mixer.__name__} lacks {', '.join(lacking)}; see based_jax/nn/mixer.py.")


def fingerprint(mixer: type) -> str:
    """Return 8 hexadecimal digits of a class's source, and of what it uses of its own module."""
    return hashlib.sha256("\n".join(_written(mixer, set())).encode()).hexdigest()[:8]


def _written(found: Any, seen: set[int]) -> Iterator[str]:
    """Yield the text of a class or a function, and of the classes, functions and constants of its module it uses."""
    if id(found) in seen:
        return
    seen.add(id(found))
    yield found.__qualname__.rpartition(".")[2]
    if isinstance(found, type):
        yield from _class(found, seen)
    else:
        yield from _function(found, seen)


def _class(found: type, seen: set[int]) -> Iterator[str]:
    """Yield what a class's body defines, its bases in the same module first."""
    for base in found.__bases__:
        if base.__module__ == found.__module__:
            yield from _written(base, seen)
    if dataclasses.is_dataclass(found):  # what it generates has no source
        yield from (f"{field.name}: {field.type} = {field.default!r}" for field in dataclasses.fields(found))
    for name, value in vars(found).items():
        function = _underlying(value)
        if isinstance(function, types.FunctionType) and function.__module__ == found.__module__:
            yield from _function(function, seen)
        elif isinstance(value, type) and value.__module__ == found.__module__:
            yield from _written(value, seen)
        elif isinstance(value, CONSTANTS) and not name.startswith("__"):
            yield f"{name} = {_text(value)}"


def _underlying(value: Any) -> Any:
    """Return the function of a property, a static or a class method; other values as they are."""
    if isinstance(value, property):
        return value.fget
    return inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value


def _function(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    """Yield a function's source, or its instructions where there is none, and what it uses of its module."""
    try:
        yield inspect.getsource(function)
    except (OSError, TypeError):
        yield from (f"{code.co_code.hex()} {code.co_names} {_plain(code)}" for code in _codes(function.__code__))
    for name in dict.fromkeys(name for code in _codes(function.__code__) for name in code.co_names):
        used = function.__globals__.get(name)
        if isinstance(used, type | types.FunctionType) and used.__module__ == function.__module__:
            yield from _written(used, seen)
        elif isinstance(used, CONSTANTS) and not name.startswith("__"):
            yield f"{name} = {_text(used)}"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _plain(code: types.CodeType) -> list[str]:
    return [_text(constant) for constant in code.co_consts if not isinstance(constant, types.CodeType)]


def _text(constant: Any) -> str:
    """Return a constant as it is written; sets in one order, since each process has its own."""
    if isinstance(constant, frozenset):
        return f"{{{', '.join(sorted(map(_text, constant)))}}}"
    if isinstance(constant, tuple):
        return f"({', '.join(map(_text, constant))})"
    return repr(constant)

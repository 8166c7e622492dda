"""Frozen dataclasses from mappings: every value is checked against its annotation, and errors name the key as typed."""

import contextlib
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from ml_collections import ConfigDict, FieldReference

from based_jax.config.keys import key_names, meant_key
from based_jax.errors import UserError, unknown

LARGEST_INT = 2**63 - 1
MAX_LETTERS_SHOWN = 200
IN_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an int, such as 128",
    float: "a float, such as 0.1",
    str: "a str, such as 'name'",
    type(None): "None",
}
EXAMPLES: dict[Any, str] = {
    bool: "True",
    int: "128",
    float: "0.1",
    str: "'name'",
    Any: "128",
    tuple[Any, dict[str, Any]]: "('conv', {'kernel_size': 3})",  # a layer
}


class _UnknownKeyError(UserError):
    """A key that its section does not have: `build` knows what else there is."""

    def __init__(self, key: str, allowed: Collection[str]):
        super().__init__(key)
        self.key, self.allowed = key, allowed


def build[T](cls: type[T], mapping: Mapping | ConfigDict, where: str = "") -> T:
    """Return the frozen dataclass `cls` with the values of `mapping`, its own defaults elsewhere.

    Values are checked against the annotations: an int passes for a float, a list for a tuple, a mapping for a
    dataclass, numbers and dtypes of numpy or JAX for Python's. `Annotated[Base, TABLE]` is the dataclass that the
    mapping's key `kind` chooses from TABLE, a dict.

    Args:
      cls: a dataclass, its fields plain types, Literal, Optional, tuple, dict, dataclasses, `Annotated` or unions of
        these.
      mapping: values by field name, nested.
      where: dotted key of `mapping` in the whole config, for messages.

    Raises:
      UserError: a key is unknown or missing, or a value has another type; from the dataclasses: a value is impossible.
    """
    try:
        with nesting_ends():
            return _build(cls, mapping, where)
    except _UnknownKeyError as error:
        raise unknown("config key", error.key, error.allowed, meant_key(error.key, key_names(cls, where))) from None


def check_types(config: Any) -> None:
    """Check a frozen dataclass that is being made as `build` checks it, and complete its values likewise.

    Raises:
      UserError: a value has another type.
    """
    annotations = _annotations(type(config))
    for field in dataclasses.fields(config):
        value = _convert(annotations[field.name], plain(getattr(config, field.name)), field.name)
        object.__setattr__(config, field.name, value)


@contextlib.contextmanager
def errors_within(section: str, keys: Collection[str]) -> Iterator[None]:
    """Put a section before the key that a UserError begins with: "window is 0" is "model.layers[2].window is 0"."""
    try:
        yield
    except UserError as error:
        raise UserError(_within(str(error), section, keys)) from error.__cause__


@contextlib.contextmanager
def nesting_ends() -> Iterator[None]:
    """Name a config of which a section holds itself."""
    try:
        yield
    except RecursionError:
        raise UserError("The config has no end: a section or a list in it holds itself.") from None


def plain(value: Any, where: str = "") -> Any:
    """Return ConfigDicts as dicts, references as what they come to, and numbers and dtypes of numpy or JAX as Python's.

    Inside dicts, lists and tuples too.
    """
    if isinstance(value, FieldReference):
        value = _referred(value, where)
    if isinstance(value, ConfigDict):
        value = dict(value.items(preserve_field_references=True))
    if isinstance(value, Mapping):
        return {str(key): plain(item, join(where, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = (plain(item, where) for item in value)
        return tuple(items) if isinstance(value, tuple) else list(items)
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    if isinstance(dtype := getattr(value, "dtype", None), np.dtype):
        return value.tolist() if hasattr(value, "shape") else dtype.name  # jnp.bfloat16 is no type
    return value


def join(where: str, name: str) -> str:
    """Return the dotted key of a name in a section."""
    return f"{where}.{name}" if where else name


def shown(value: Any) -> str:
    """Return a value as Python writes it, at most so many letters, or the type of what is no value of a config."""
    if isinstance(value, int) and abs(value) > LARGEST_INT**2:
        return f"an int of {value.bit_length()} bits"  # Python refuses to write a very long one
    if value is not None and not isinstance(value, str | int | float | list | tuple | dict | ConfigDict):
        return f"of type {type(value).__name__}"
    try:
        text = repr(value)
    except Exception:  # of an object in a list, of a placeholder in a section
        return f"of type {type(value).__name__}"
    return text if len(text) <= MAX_LETTERS_SHOWN else text[:MAX_LETTERS_SHOWN] + "..."


def in_words(kind: Any) -> str:
    """Return what an annotation allows: types by example."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (types.UnionType, typing.Union):
        *first, last = map(in_words, args)
        return f"{', '.join(first)}, or {last}" if "such as" in first[-1] else f"{', '.join(first)} or {last}"
    if _is_section(kind):
        return "a section of keys"
    if origin in (tuple, dict):
        return f"a {origin.__name__}, such as {_example(kind)}"
    return IN_WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _example(kind: Any) -> str:
    """Return a value of an annotation as Python writes it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in EXAMPLES:
        return EXAMPLES[kind]
    if origin is dict:
        return f"{{{_example(args[0])}: {_example(args[1])}}}"
    if origin is tuple:
        items = [_example(item) for item in args if item is not ...]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if dataclasses.is_dataclass(kind):
        items = [f"'{name}': {_example(item)}" for name, item in _annotations(typing.cast(type, kind)).items()]
        return f"{{{', '.join(items)}}}"
    return repr(args[0]) if origin is Literal else _example(args[0]) if args else str(kind)


def _build[T](cls: type[T], mapping: Mapping | ConfigDict, where: str) -> T:
    values = plain(mapping, where)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    annotations = _annotations(cls)
    for name in values:
        if name not in fields:
            raise _UnknownKeyError(join(where, name), [join(where, field) for field in fields])
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"Config key '{join(where, name)}' is missing; it is {in_words(annotations[name])}.")
    found = {name: _convert(annotations[name], value, join(where, name)) for name, value in values.items()}
    with errors_within(where, fields):
        return cls(**found)


def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _within(message: str, section: str, keys: Collection[str]) -> str:
    """Return a message whose first key, one of `keys`, stands in a section, or that names the section."""
    if not section:
        return message
    key = "|".join(map(re.escape, sorted(keys, key=len, reverse=True)))
    if unknown_value := re.match(rf"Unknown ({key}) '[^']*'", message):
        return f"{unknown_value[0]} ({section}.{unknown_value[1]}){message[unknown_value.end() :]}"
    named, found = re.subn(rf"^((?:Config key ')?)({key})\b", rf"\g<1>{section}.\g<2>", message, count=1)
    return named if found or message.startswith(("Unknown ", "Config key ")) else f"{section}: {message}"


def _referred(reference: FieldReference, where: str) -> Any:
    try:
        return reference.get()
    except Exception as error:
        raise UserError(
            f"Config key '{where}' is a reference that fails with {type(error).__name__}: {error}."
        ) from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as annotation `kind` wants it, or raise a UserError that names the key."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _convert_kind(args[1], value, where)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(kind, value, where)
    if origin is Literal and any(value == arg and type(value) is type(arg) for arg in args):
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(typing.cast(type, kind), value, where)
    if origin is tuple and isinstance(value, list | tuple) and (args[-1] is ... or len(args) == len(value)):
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(args[1], item, join(where, key)) for key, item in value.items()}
    return _convert_plain(kind, value, where)


def _convert_plain(kind: Any, value: Any, where: str) -> Any:
    """Return a number, a string or a dataclass, or raise a UserError that names the key."""
    is_int = type(value) is int
    if kind is float and is_int and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is int and is_int and abs(value) > LARGEST_INT:
        raise UserError(f"Config key '{where}' is {shown(value)}; it is an int of 64 bits.")
    if type(value) is kind:
        return value
    raise UserError(f"Config key '{where}' is {shown(value)}; it is {in_words(kind)}.")


def _convert_kind(classes: Mapping[str, type], value: Any, where: str) -> Any:
    """Return the dataclass of a table that the key `kind` of `value` chooses."""
    if dataclasses.is_dataclass(value):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"Config key '{where}' is {shown(value)}; it is a section of keys.")
    if "kind" not in value:
        raise UserError(f"Config key '{where}.kind' is missing; it is one of {', '.join(sorted(classes))}.")
    kind = str(value["kind"])
    if kind not in classes:
        raise unknown(f"{where}.kind", kind, classes)
    return _build(classes[kind], value, where)


def _convert_union(kind: Any, value: Any, where: str) -> Any:
    """Return a mapping as the section or the dict among the members, and other values as the first that takes them."""
    members = typing.get_args(kind)
    for member in members:
        if isinstance(value, Mapping) and (_is_section(member) or typing.get_origin(member) is dict):
            return _convert(member, value, where)
        if isinstance(value, list | tuple) and _is_sections(member):
            return _convert(member, value, where)
    for member in members:
        with contextlib.suppress(UserError):
            return _convert(member, value, where)
    raise UserError(f"Config key '{where}' is {shown(value)}; it is {in_words(kind)}.")


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Annotated


def _is_sections(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple and _is_section(typing.get_args(kind)[0])

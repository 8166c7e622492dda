"""Configs: a Python file returns a ConfigDict, overrides change it, and frozen dataclasses check and complete it.

Defaults live in the dataclasses only. A config file holds what differs from them and imports nothing from the package:

    VARIANTS = {"small": {"d_model": 64}, "large": {"d_model": 512}}      # optional: the names after the colon

    def get_config(variant="small"):
        return ml_collections.ConfigDict({"model": VARIANTS[variant], "steps": 1000})
"""

import ast
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from based_jax.errors import UserError, unknown

FILE = "config.json"
SHOWN = 3


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """Return the config of a file, with overrides applied.

    Args:
      spec: 'path/to/file.py' or 'path/to/file.py:variant'; the variant is the argument of the file's `get_config`.
      overrides: (dotted key, text) pairs, later ones win; texts are Python literals, and strings where they are none.
        A key that the file leaves out is fine here: `build` knows which keys exist.

    Raises:
      UserError: the file is missing or fails, has no such variant, or a key leads through a value.
    """
    config = call(spec, "get_config")
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(f"Config '{spec}' is {config!r:.80}; get_config returns a ConfigDict.")
    return ConfigDict(overridden(config, {key: _parse(text) for key, text in overrides}))


def call(spec: str, function: str) -> Any:
    """Return what a function of a file returns.

    Args:
      spec: 'path/to/file.py', or 'path/to/file.py:variant'; the variant is the function's argument.
      function: its name.

    Raises:
      UserError: the file is missing or fails, or has no such variant.
    """
    path, _, variant = spec.partition(":")
    found = _get_function(path, variant, function)
    try:
        return found(variant) if variant else found()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Config '{spec}' fails with {type(error).__name__}: {error}.") from error


def overridden(config: Mapping | ConfigDict, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as nested dicts with the values of dotted keys replaced, or added.

    Raises:
      UserError: a key leads through a value.
    """
    plain = copy.deepcopy(_plain(config))
    for key, value in values.items():
        _override(plain, key, value)
    return plain


def build[T](cls: type[T], mapping: Mapping | ConfigDict, where: str = "") -> T:
    """Return the frozen dataclass `cls` with the values of `mapping`, its own defaults elsewhere.

    Values are checked against the annotations: an int passes for a float, a list for a tuple, a mapping for a
    dataclass. A union of dataclasses is chosen by the key `kind`, which each of them has as a field with a default.

    Args:
      cls: a dataclass, its fields plain types, Literal, Optional, tuple, dict, dataclasses or unions of these.
      mapping: values by field name, nested.
      where: dotted key of `mapping` in the whole config, for messages.

    Raises:
      UserError: a key is unknown or missing, or a value has another type; from the dataclasses: a value is impossible.
    """
    values = _plain(mapping)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    annotations = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise unknown("config key", _join(where, name), [_join(where, field) for field in fields])
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"Config key '{_join(where, name)}' is missing; it is {_describe(annotations[name])}.")
    return cls(**{name: _convert(annotations[name], value, _join(where, name)) for name, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass with all its values, or a mapping, as nested dicts and lists that JSON can hold."""
    values = _plain(config) if isinstance(config, Mapping | ConfigDict) else dataclasses.asdict(config)
    return json.loads(json.dumps(values))


def config_id(config: Any) -> str:
    """Return 12 hexadecimal digits that name a resolved config: equal values give equal ids."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]


def save(config: Any, workdir: str | os.PathLike) -> None:
    """Write the resolved config as config.json into a workdir, whole or not at all."""
    path = Path(workdir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    part.replace(path)


def check_same(config: Any, workdir: str | os.PathLike, free: Collection[str] = ()) -> None:
    """Check that a workdir is new, or that its config.json equals the resolved config.

    Args:
      config: the resolved config of this run.
      workdir: where the run writes.
      free: dotted keys, or sections, that may differ.

    Raises:
      UserError: another config made the workdir, or its config.json cannot be read.
    """
    path = Path(workdir) / FILE
    if not path.exists():
        return
    try:
        old = _flatten(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise UserError(f"'{path}' is no config ({error}); choose an empty workdir, or restore this file.") from None
    new = _flatten(to_dict(config))
    keys = [key for key in sorted(old | new) if _shown(old, key) != _shown(new, key) and not _under(key, free)]
    if keys:
        shown = [f"{key} is {_shown(old, key)} there and {_shown(new, key)} here" for key in keys[:SHOWN]]
        more = f", and {len(keys) - SHOWN} more keys differ" if len(keys) > SHOWN else ""
        raise UserError(f"Workdir '{workdir}' belongs to another config: {', '.join(shown)}{more}; choose another one.")


def _get_function(path: str, variant: str, name: str) -> Callable:
    """Execute a file and return its function of that name."""
    namespace: dict[str, Any] = {"__name__": Path(path).stem, "__file__": path}
    try:
        exec(compile(Path(path).read_text(), path, "exec"), namespace)
    except OSError as error:
        raise UserError(f"Config file '{path}' cannot be read: {error.strerror}.") from None
    except Exception as error:
        raise UserError(f"Config file '{path}' fails with {type(error).__name__}: {error}.") from error
    found = namespace.get(name)
    if not callable(found):
        raise UserError(f"Config file '{path}' has no function {name}(variant).")
    if variant and "VARIANTS" in namespace and variant not in namespace["VARIANTS"]:
        raise unknown(f"variant of '{path}'", variant, namespace["VARIANTS"])
    if variant and not inspect.signature(found).parameters:
        raise UserError(f"Config file '{path}' has no variants, so not '{variant}': its {name} takes no argument.")
    return found


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the sections on its way."""
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, start=1):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"Override '{key}': '{'.'.join(sections[:depth])}' is {values!r:.80}, which has no keys.")
    values[name] = value


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _plain(value: Any) -> Any:
    """Return ConfigDicts as dicts, inside lists and tuples too."""
    if isinstance(value, Mapping | ConfigDict):
        return {str(key): _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as annotation `kind` wants it, or raise a UserError that names the key."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(args, value, where)
    if origin is Literal and value in args:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return build(typing.cast(type, kind), value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, list | tuple) and (args[-1] is ... or len(args) == len(value)):
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(args[1], item, _join(where, key)) for key, item in value.items()}
    if type(value) is kind:
        return value
    raise UserError(f"Config key '{where}' is {value!r}; it is {_describe(kind)}.")


def _convert_union(members: tuple, value: Any, where: str) -> Any:
    """Return `value` as the dataclass among `members` that it names, or as the first member that takes it."""
    sections = [member for member in members if dataclasses.is_dataclass(member)]
    if sections and isinstance(value, Mapping):
        return build(_chosen(sections, value, where), value, where)
    for member in members:
        with contextlib.suppress(UserError):
            return _convert(member, value, where)
    raise UserError(f"Config key '{where}' is {value!r}; it is {' or '.join(map(_describe, members))}.")


def _chosen(sections: list, value: Mapping, where: str) -> type:
    """Return the dataclass that the key `kind` names; a single one needs no name."""
    if len(sections) == 1:
        return sections[0]
    kinds = {section.kind: section for section in sections}
    if "kind" not in value:
        raise UserError(f"Config key '{where}.kind' is missing; it is one of {', '.join(sorted(kinds))}.")
    if value["kind"] not in kinds:
        raise unknown(f"{where}.kind", str(value["kind"]), kinds)
    return kinds[value["kind"]]


def _describe(kind: Any) -> str:
    """Return what an annotation allows, in words."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, args))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(map(_describe, args))
    if dataclasses.is_dataclass(kind):
        return "a section of keys"
    if kind is type(None):
        return "None"
    return getattr(kind, "__name__", str(kind)) if not args else str(kind)


def _flatten(values: Mapping, where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = _join(where, name)
        flat |= _flatten(value, key) if isinstance(value, Mapping) else {key: value}
    return flat


def _shown(flat: Mapping, key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"


def _under(key: str, sections: Collection[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name

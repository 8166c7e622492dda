"""Configs: a Python file returns a ConfigDict, overrides change it, and frozen dataclasses check and complete it.

Defaults live in the dataclasses only. A config file holds what differs from them and imports nothing from the package,
but may import files of its own folder. A value that follows another is a reference:

    VARIANTS = {"small": {"d_model": 64}, "large": {"d_model": 512}}      # optional: the names after the colon

    def get_config(variant="small"):
        config = ml_collections.ConfigDict({"model": VARIANTS[variant], "optim": {}, "steps": 1000})
        config.optim.warmup_steps = config.get_ref("steps") // 100
        return config
"""

import ast
import builtins
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
from typing import Annotated, Any, Literal

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, FieldReference

from based_jax.errors import UserError, unknown
from based_jax.folders import local_folder, make_folder, reason, writing

CONFIG_FILE = "config.json"
MAX_DIFFERENCES_SHOWN = 3
ADDED_LATER = "added later"
"""Marks a dataclass field that `to_dict` leaves out while it has its default."""


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """Return the config of a file, with overrides applied.

    Args:
      spec: 'path/to/file.py' or 'path/to/file.py:variant'; the variant is the argument of the file's `get_config`.
      overrides: (dotted key, text) pairs, later ones win; texts are Python literals, and strings where they are none.
        A key that the file leaves out is fine here: `build` knows which keys exist.

    Raises:
      UserError: the file is missing or fails, has no such variant, a key leads through a value, or a value that others
        follow would change its type.
    """
    config = call_in_file(spec, "get_config")
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(f"Config '{spec}' is {config!r:.80}; get_config returns a ConfigDict.")
    return overridden(config, {key: _parse(text) for key, text in overrides})


def call_in_file(spec: str, function: str) -> Any:
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


def overridden(config: Mapping | ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a config with the values of dotted keys replaced, or added; references to them follow.

    Raises:
      UserError: a key leads through a value, a value that others follow would change its type, or the config itself has
        dotted keys.
    """
    changed = copy.deepcopy(_sections(config)).unlock()
    for key, value in values.items():
        _override(changed, key, value)
    return changed


def build[T](cls: type[T], mapping: Mapping | ConfigDict, where: str = "") -> T:
    """Return the frozen dataclass `cls` with the values of `mapping`, its own defaults elsewhere.

    Values are checked against the annotations: an int passes for a float, a list for a tuple, a mapping for a
    dataclass. `Annotated[Base, TABLE]` is the dataclass that the mapping's key `kind` chooses from TABLE, a dict.

    Args:
      cls: a dataclass, its fields plain types, Literal, Optional, tuple, dict, dataclasses, `Annotated` or unions of
        these.
      mapping: values by field name, nested.
      where: dotted key of `mapping` in the whole config, for messages.

    Raises:
      UserError: a key is unknown or missing, or a value has another type; from the dataclasses: a value is impossible.
    """
    values = _plain(mapping, where)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    annotations = typing.get_type_hints(cls, include_extras=True)
    for name in values:
        if name not in fields:
            raise unknown("config key", _join(where, name), [_join(where, field) for field in fields])
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"Config key '{_join(where, name)}' is missing; it is {_describe(annotations[name])}.")
    return cls(**{name: _convert(annotations[name], value, _join(where, name)) for name, value in values.items()})


def added_later[T](default: T) -> T:
    """Return the field of a dataclass that has been written into rows and runs without it, with this default.

    `to_dict` leaves it out while it has the default, and so do `config_id` and config.json: what was written before
    keeps its name and its values. All fields that are added to a config or to a mixer's options are of this kind.
    """
    return dataclasses.field(default=default, metadata={ADDED_LATER: True})


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass, or a mapping, as nested dicts and lists that JSON can hold.

    All values of a dataclass are there but those of fields that were `added_later` and have their default.
    """
    values = _plain(config) if isinstance(config, Mapping | ConfigDict) else _written(config)
    return json.loads(json.dumps(values))


def config_id(config: Any) -> str:
    """Return 12 hexadecimal digits that name a resolved config: equal values give equal ids."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]


def save(config: Any, workdir: str | os.PathLike) -> None:
    """Write the resolved config as config.json into a workdir, whole or not at all.

    Raises:
      UserError: the file system refuses.
    """
    path = local_folder(workdir) / CONFIG_FILE
    make_folder(path.parent)
    part = path.with_suffix(".json.part")
    with writing(path):
        part.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        part.replace(path)


def read[T](cls: type[T], workdir: str | os.PathLike) -> T:
    """Return the config that `save` wrote, of the dataclass `cls`; a key that is newer than the file has its default.

    Raises:
      UserError: there is no config.json, it is damaged, or it holds a key or a value that no longer exists.
    """
    path = local_folder(workdir) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{workdir}' is no run: it has no {CONFIG_FILE}.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {reason(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is no config ({error}); choose another workdir, or restore this file.") from None
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is no config (it is {values!r:.40}); choose another workdir, or restore this file.")
    try:
        return build(cls, values)
    except UserError as error:
        raise UserError(f"'{path}' does not fit this version of based_jax: {error}") from None


def check_same(config: Any, workdir: str | os.PathLike, free: Collection[str] = ()) -> dict[str, tuple[str, str]]:
    """Check that a workdir is new, or that its config.json comes to the resolved config, but for what may differ.

    Args:
      config: the resolved config of this run, a dataclass.
      workdir: where the run writes.
      free: dotted keys, or sections, that may differ.

    Returns:
      Of each free key that differs, by its dotted name, the value there and the value here, as Python writes them.

    Raises:
      UserError: another config made the workdir, or as `read`.
    """
    if not os.path.lexists(local_folder(workdir) / CONFIG_FILE):
        return {}
    old, new = (flatten_dict(to_dict(x), sep=".") for x in (read(type(config), workdir), config))
    different = [key for key in sorted(old | new) if _shown(old, key) != _shown(new, key)]
    keys = [key for key in different if not _under(key, free)]
    if keys:
        shown = [
            f"{key} is {_shown(old, key)} there and {_shown(new, key)} here" for key in keys[:MAX_DIFFERENCES_SHOWN]
        ]
        hidden = len(keys) - len(shown)
        more = f", and {hidden} more keys differ" if hidden else ""
        raise UserError(f"Workdir '{workdir}' belongs to another config: {', '.join(shown)}{more}; choose another one.")
    return {key: (_shown(old, key), _shown(new, key)) for key in different}


def _written(value: Any) -> Any:
    """Return dataclasses as dicts, inside dicts, lists and tuples too, without what `added_later` leaves out."""
    if dataclasses.is_dataclass(value):
        fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {
            field.name: _written(item)
            for field, item in fields
            if not (ADDED_LATER in field.metadata and item == field.default)
        }
    if isinstance(value, Mapping):
        return {key: _written(item) for key, item in value.items()}
    return [_written(item) for item in value] if isinstance(value, list | tuple) else value


def _get_function(path: str, variant: str, name: str) -> Callable:
    """Execute a file and return its function of that name."""
    try:
        namespace = vars(_execute(Path(path), {}))
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


def _execute(path: Path, siblings: dict[str, types.ModuleType]) -> types.ModuleType:
    """Execute a file as a module whose imports find the files of its own folder first.

    Only its own `import` statements are told of the folder: `sys.path` and `sys.modules` stay as they are, so no
    library takes such a file for a module of its own, nor a folder's file for another folder's of the same name.
    """
    module = siblings[path.stem] = types.ModuleType(path.stem)

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        sibling = path.with_name(f"{name}.py")
        if level == 0 and sibling.is_file():
            return siblings.get(name) or _execute(sibling, siblings)
        return builtins.__import__(name, globals, locals, fromlist, level)

    vars(module).update(__file__=str(path), __builtins__=vars(builtins) | {"__import__": import_})
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    return module


def _sections(config: Mapping | ConfigDict) -> ConfigDict:
    """Return a ConfigDict; of a mapping, each section is one of its own, even where two are the same object."""
    if isinstance(config, ConfigDict):
        return ConfigDict(config)
    for key in config:
        if "." in str(key):
            raise UserError(f"Config key '{key}' has a dot; in a mapping a section is a mapping of its own.")
    return ConfigDict({key: _sections(item) if isinstance(item, Mapping) else item for key, item in config.items()})


def _override(section: ConfigDict, key: str, value: Any) -> None:
    """Set a dotted key, making the sections on its way."""
    *names, last = key.split(".")
    for depth, name in enumerate(names, start=1):
        if name not in section:
            section[name] = ConfigDict()
        section = section[name]
        if not isinstance(section, ConfigDict):
            raise UserError(f"Override '{key}': '{'.'.join(names[:depth])}' is {section!r:.80}, which has no keys.")
    reference = dict(section.items(preserve_field_references=True)).get(last)
    if isinstance(reference, FieldReference):
        _set_reference(reference, key, value)
        return
    if last in section:
        del section[last]  # a value of another type may take its place: `build` knows which types are allowed
    section[last] = value


def _set_reference(reference: FieldReference, key: str, value: Any) -> None:
    """Set a value that others follow, and that keeps its type for their sake."""
    try:
        reference.set(value)
    except TypeError:
        raise UserError(f"Config key '{key}' is {value!r}; it is {_describe(reference.get_type())}.") from None


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _plain(value: Any, where: str = "") -> Any:
    """Return ConfigDicts as dicts, inside lists and tuples too, and references as what they come to."""
    if isinstance(value, FieldReference):
        value = _referred(value, where)
    if isinstance(value, ConfigDict):
        value = dict(value.items(preserve_field_references=True))
    if isinstance(value, Mapping):
        return {str(key): _plain(item, _join(where, str(key))) for key, item in value.items()}
    return type(value)(_plain(item, where) for item in value) if isinstance(value, list | tuple) else value


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
        return _build_kind(args[1], value, where)
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


def _build_kind(classes: Mapping[str, type], value: Any, where: str) -> Any:
    """Return the dataclass of a table that the key `kind` of `value` chooses."""
    if not isinstance(value, Mapping):
        raise UserError(f"Config key '{where}' is {value!r}; it is a section of keys.")
    if "kind" not in value:
        raise UserError(f"Config key '{where}.kind' is missing; it is one of {', '.join(sorted(classes))}.")
    kind = str(value["kind"])
    if kind not in classes:
        raise unknown(f"{where}.kind", kind, classes)
    return build(classes[kind], value, where)


def _convert_union(members: tuple, value: Any, where: str) -> Any:
    """Return `value` as the section among `members` if it is a mapping, or as the first member that takes it."""
    for member in members:
        if isinstance(value, Mapping) and _is_section(member):
            return _convert(member, value, where)
    for member in members:
        with contextlib.suppress(UserError):
            return _convert(member, value, where)
    raise UserError(f"Config key '{where}' is {value!r}; it is {' or '.join(map(_describe, members))}.")


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Annotated


def _describe(kind: Any) -> str:
    """Return what an annotation allows, in words."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, args))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(map(_describe, args))
    if _is_section(kind):
        return "a section of keys"
    if kind is type(None):
        return "None"
    return getattr(kind, "__name__", str(kind)) if not args else str(kind)


def _shown(flat: Mapping, key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"


def _under(key: str, sections: Collection[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name

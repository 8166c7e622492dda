"""A resolved config as JSON: its values, its name, and the config.json of a workdir."""

import dataclasses
import fnmatch
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from based_jax.config.checks import build, plain
from based_jax.errors import UserError
from based_jax.folders import local_path, make_folder, read_file, reason, write_whole

CONFIG_FILE = "config.json"
MAX_DIFFERENCES_SHOWN = 3
ADDED_LATER = "added later"
"""Marks a dataclass field that `to_dict` leaves out while it has its default."""


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
    values = plain(config) if isinstance(config, Mapping | ConfigDict) else _written(config)
    return json.loads(json.dumps(values))


def config_id(config: Any) -> str:
    """Return 12 hexadecimal digits that name a resolved config: equal values give equal ids."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]


def save(config: Any, workdir: str | os.PathLike) -> None:
    """Write the resolved config as config.json into a workdir, whole or not at all.

    Raises:
      UserError: the file system refuses.
    """
    path = local_path(workdir) / CONFIG_FILE
    make_folder(path.parent)
    write_whole(path, json.dumps(to_dict(config), indent=2) + "\n")


def read[T](cls: type[T], workdir: str | os.PathLike, known: Collection[str] = ()) -> T:
    """Return the config that `save` wrote, of the dataclass `cls`; a key that is newer than the file has its default.

    Args:
      cls: its class.
      workdir: where it lies.
      known: texts that know more than the file keeps of them, as a mixer's class does; they stand where it has them.

    Raises:
      UserError: there is no config.json, it is damaged, or it holds a key or a value that no longer exists.
    """
    path = local_path(workdir) / CONFIG_FILE
    try:
        values = json.loads(read_file(path).decode())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{workdir}' is no run: it has no {CONFIG_FILE}.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {reason(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is no config ({error}); choose another workdir, or restore this file.") from None
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is no config (it is {values!r:.40}); choose another workdir, or restore this file.")
    try:
        return build(cls, _with_known(values, {text: text for text in known}))
    except UserError as error:
        raise UserError(f"'{path}' does not fit this version of based_jax: {error}") from None


def check_same(config: Any, workdir: str | os.PathLike, free: Collection[str] = ()) -> dict[str, tuple[str, str]]:
    """Check that a workdir is new, or that its config.json comes to the resolved config, but for what may differ.

    Args:
      config: the resolved config of this run, a dataclass.
      workdir: where the run writes.
      free: dotted keys, or sections, that may differ; see `is_under`.

    Returns:
      Of each free key that differs, by its dotted name, the value there and the value here, as Python writes them.

    Raises:
      UserError: another config made the workdir, or as `read`.
    """
    if not os.path.lexists(local_path(workdir) / CONFIG_FILE):
        return {}
    both = read(type(config), workdir, known_texts(config)), config
    old, new = (flatten_dict(to_dict(x), sep=".") for x in both)
    different = [key for key in sorted(old | new) if _shown(old, key) != _shown(new, key)]
    old, new = map(every_value, both)
    keys = [key for key in different if not any(is_under(key, place) for place in free)]
    if keys:
        shown = [
            f"{key} is {_shown(old, key)} there and {_shown(new, key)} here" for key in keys[:MAX_DIFFERENCES_SHOWN]
        ]
        hidden = len(keys) - len(shown)
        more = f", and {hidden} more keys differ" if hidden else ""
        raise UserError(f"Workdir '{workdir}' belongs to another config: {', '.join(shown)}{more}; choose another one.")
    return {key: (_shown(old, key), _shown(new, key)) for key in different}


def known_texts(config: Any) -> list[str]:
    """Return the texts in a config that know more than JSON keeps of them: they are of classes of their own."""
    if dataclasses.is_dataclass(config):
        return known_texts([getattr(config, field.name) for field in dataclasses.fields(config)])
    if isinstance(config, Mapping):
        return known_texts(list(config.values()))
    if isinstance(config, list | tuple):
        return [text for item in config for text in known_texts(item)]
    return [config] if isinstance(config, str) and type(config) is not str else []


def every_value(config: Any) -> dict[str, Any]:
    """Return the values of a dataclass by dotted keys, those that `to_dict` leaves out too, as JSON holds them."""
    return flatten_dict(to_dict(dataclasses.asdict(config)), sep=".")


def is_under(key: str, place: str) -> bool:
    """Return whether a dotted key is this one or in this section; '*' in a place stands for any name."""
    return fnmatch.fnmatchcase(key, place) or fnmatch.fnmatchcase(key, f"{place}.*")


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


def _with_known(value: Any, known: Mapping[str, str]) -> Any:
    """Return a value of JSON in which known texts stand in place of those that are equal to them."""
    if isinstance(value, dict):
        return {key: _with_known(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_known(item, known) for item in value]
    return known.get(value, value) if isinstance(value, str) else value


def _shown(flat: Mapping, key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"

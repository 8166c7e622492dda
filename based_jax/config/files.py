"""Config files: Python files that are executed, and overrides of what they return."""

import ast
import builtins
import contextlib
import copy
import dataclasses
import inspect
import itertools
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

from based_jax.config.checks import in_words, nesting_ends, shown
from based_jax.errors import UserError, unknown
from based_jax.folders import read_file

MODULE_PREFIX = "_based_jax_file_"
"""Begins the names in `sys.modules` of files that were executed; a number of their own follows."""
_numbers = itertools.count()


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
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(f"Config '{spec}' is {shown(config)}; get_config returns a ConfigDict.")
    return overridden(config, {key: _parse(text) for key, text in overrides})


def call_in_file(spec: str, function: str) -> Any:
    """Return what a function of a file returns.

    Args:
      spec: 'path/to/file.py', or 'path/to/file.py:variant'; the variant is the function's argument.
      function: its name.

    Raises:
      UserError: the file is missing or fails, or has no such variant; the sentence ends with the place in the file.
    """
    path, _, variant = spec.partition(":")
    modules: dict[str, types.ModuleType] = {}
    found = _get_function(path, variant, function, modules)
    with _failures_named(f"Config '{spec}'", modules):
        result = found(variant) if variant else found()
    if inspect.iscoroutine(result):
        result.close()  # else Python warns that nobody awaits it
    return result


def class_in_file(spec: str) -> type:
    """Return the class of 'path/to/file.py:Class'.

    Raises:
      UserError: the file is missing or fails, or has no such class; or the spec names none.
    """
    path, _, name = spec.partition(":")
    if not name:
        raise UserError(f"'{spec}' names no class; it is path/to/file.py:Class.")
    namespace = _namespace(path, {}, "File")
    found = namespace.get(name)
    if not isinstance(found, type):
        classes = [key for key, value in namespace.items() if _is_defined_there(value, namespace)]
        if not classes:
            raise UserError(f"'{path}' has no class '{name}'; it defines none.")
        raise unknown(f"class of '{path}'", name, classes)
    return found


def _is_defined_there(value: Any, namespace: Mapping[str, Any]) -> bool:
    return isinstance(value, type) and value.__module__ == namespace["__name__"]


def overridden(config: Mapping | ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a config with the values of dotted keys replaced, or added; references to them follow.

    Raises:
      UserError: a key leads through a value, a value that others follow would change its type, or the config itself has
        dotted keys.
    """
    with nesting_ends():
        changed = _copied(_sections(config))
        _unlock(changed)
    for key, value in values.items():
        _override(changed, key, value)
    return changed


def _get_function(path: str, variant: str, name: str, modules: dict[str, types.ModuleType]) -> Callable:
    """Execute a file and return its function of that name."""
    namespace = _namespace(path, modules, "Config file")
    with _failures_named(f"Config file '{path}'", modules):
        return _checked_function(path, variant, name, namespace)


def _namespace(path: str, modules: dict[str, types.ModuleType], what: str) -> dict[str, Any]:
    """Execute a file and return what it defines; `what` it is called in sentences."""
    try:
        source = read_file(path)
    except (OSError, ValueError) as error:  # the path may hold a null byte
        raise UserError(f"{what} '{path}' cannot be read: {getattr(error, 'strerror', error)}.") from None
    with _failures_named(f"{what} '{path}'", modules):
        return vars(_execute(Path(path), source, modules))


def _checked_function(path: str, variant: str, name: str, namespace: Mapping[str, Any]) -> Callable:
    """Return the function of that name if it takes the variant."""
    found = namespace.get(name)
    if not callable(found):
        raise UserError(f"Config file '{path}' has no function {name}(variant).")
    variants = namespace.get("VARIANTS")
    if variant and isinstance(variants, Iterable) and variant not in variants:
        raise unknown(f"variant of '{path}'", variant, variants)
    parameters = inspect.signature(found).parameters.values()
    if variant and not parameters:
        raise UserError(f"Config file '{path}' has no variants, so not '{variant}': its {name} takes no argument.")
    if not variant and any(_is_required(parameter) for parameter in parameters):
        known = f"; it is one of {', '.join(map(str, variants))}" if isinstance(variants, Iterable) else ""
        raise UserError(f"Config file '{path}' needs a variant, as in '{path}:VARIANT'{known}.")
    return found


def _is_required(parameter: inspect.Parameter) -> bool:
    kinds = (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind in kinds


def _execute(path: Path, source: bytes, siblings: dict[str, types.ModuleType]) -> types.ModuleType:
    """Execute a file as a module whose imports find the files of its own folder first.

    Only its own `import` statements are told of the folder: `sys.path` stays as it is, and in `sys.modules` the file
    has a name that nobody else uses, so no library takes such a file for a module of its own, nor a folder's file for
    another folder's of the same name. It stands there because what it defines looks for its module: a dataclass with
    postponed annotations, for one.
    """
    name = f"{MODULE_PREFIX}{next(_numbers)}_{path.stem}"
    module = siblings[path.stem] = sys.modules[name] = types.ModuleType(name)

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        sibling = path.with_name(f"{name}.py")
        if level == 0 and sibling.is_file():
            return siblings.get(name) or _execute(sibling, sibling.read_bytes(), siblings)
        return builtins.__import__(name, globals, locals, fromlist, level)

    vars(module).update(__file__=str(path), __builtins__=vars(builtins) | {"__import__": import_})
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[vars(module)["__name__"]]
        raise
    return module


@contextlib.contextmanager
def _failures_named(what: str, modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Turn what a file raises into a sentence with the innermost place in it, or in a file that it imports."""
    try:
        yield
    except UserError as error:
        place = _place(error, modules)
        raise UserError(f"{place}: {error}" if place else str(error)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a file may raise what is no Exception, SystemExit for one
        reason = re.sub(MODULE_PREFIX + r"\d+_", "", " ".join(_told(error).split())).rstrip(".")
        place = _place(error, modules)
        raise UserError(
            f"{what} fails with {type(error).__name__}{': ' if reason else ''}{reason}{' at ' if place else ''}{place}."
        ) from error


def _told(error: BaseException) -> str:
    """Return what an error says, which may be none of our own and fail at that."""
    try:
        return str(error)
    except Exception:
        return ""


def _place(error: BaseException, modules: Mapping[str, types.ModuleType]) -> str:
    """Return 'path:line' of where an error was raised in the files of these modules, the innermost; '' if nowhere."""
    files = {module.__file__ for module in modules.values()}
    if isinstance(error, SyntaxError) and error.filename in files:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _sections(config: Mapping | ConfigDict) -> ConfigDict:
    """Return a ConfigDict; of a mapping, each section is one of its own, even where two are the same object."""
    if isinstance(config, ConfigDict):
        return ConfigDict(config)
    for key in config:
        if "." in str(key):
            raise UserError(f"Config key '{key}' has a dot; in a mapping a section is a mapping of its own.")
    return ConfigDict(
        {str(key): _sections(item) if isinstance(item, Mapping) else item for key, item in config.items()}
    )


def _copied(config: ConfigDict) -> ConfigDict:
    try:
        return copy.deepcopy(config)
    except RecursionError:
        raise
    except Exception as error:  # a generator, an open file
        raise UserError(f"The config holds a value that is none of a config: {_told(error)}.") from error


def _unlock(section: ConfigDict) -> None:
    """Unlock a config and its sections; `ConfigDict.unlock` stops at a placeholder, which an override may fill."""
    with contextlib.suppress(RequiredValueError):
        section.unlock()
    for item in dict(section.items(preserve_field_references=True)).values():
        if isinstance(item, ConfigDict):
            _unlock(item)


def _override(section: ConfigDict, key: str, value: Any) -> None:
    """Set a dotted key, making the sections on its way."""
    *names, last = key.split(".")
    for depth, name in enumerate(names, start=1):
        if name not in section:
            section[name] = ConfigDict()
        section = section[name]
        if not isinstance(section, ConfigDict):
            raise UserError(f"Override '{key}': '{'.'.join(names[:depth])}' is {shown(section)}, which has no keys.")
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
        raise UserError(f"Config key '{key}' is {shown(value)}; it is {in_words(reference.get_type())}.") from None


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: parentheses
        return text

"""The skeleton of a mixer: a file of its own, or one more mixer of a checkout with its test entry and README row."""

import keyword
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from based_jax.errors import UserError
from based_jax.folders import local_path, reason, write_whole
from based_jax.nn.mixers import MIXERS

MIXERS_FILE = Path("based_jax/nn/mixers/__init__.py")
NAMES_FILE = Path("based_jax/nn/names.py")
TESTS_FILE = Path("tests/helpers/small_mixers.py")
README_FILE = Path("README.md")
TEST_OPTIONS = '{"num_heads": 2, "key_dim": 4}'
STATE = "H K V"
"""Of the skeleton, as the README's table writes it."""


def class_name(name: str) -> str:
    """Return the class of a mixer: that of "my_mixer" is MyMixer.

    Raises:
      UserError: the name is none of a mixer.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise UserError(f"'{name}' is no name of a mixer; it is of small letters, digits and '_', such as 'my_mixer'.")
    return "".join(word.capitalize() for word in name.split("_"))


def source(name: str) -> str:
    """Return the skeleton of a mixer of that name, which keeps the contracts as it stands."""
    text = (resources.files("based_jax.newcomer") / "assets" / "mixer.py.txt").read_text()
    _check_unbound(name, text, "the skeleton")
    return text.replace("{title}", _title(name)).replace("{name}", class_name(name))


def write_file(name: str, path: str) -> Path:
    """Write the skeleton into a file of its own, and return its path.

    Raises:
      UserError: the name is none of a mixer, or the file is there, or cannot be written.
    """
    text, target = source(name), local_path(path, "--file")
    if target.suffix != ".py":
        raise UserError(f"--file is '{path}'; it ends in .py.")
    _check_new(target)
    write_whole(target, text)
    return target


def write_into(name: str, root: Path) -> list[Path]:
    """Write a mixer into a checkout: its file, a line each in the tables of mixers, names, tests and README.

    Returns:
      the files, the new one first.

    Raises:
      UserError: there is such a mixer, or such a class, the folder is no checkout, or a file cannot be written; nothing
        is written then.
    """
    text, new = source(name), root / MIXERS_FILE.with_name(f"{name}.py")
    if name in MIXERS:
        raise UserError(f"There is a mixer '{name}'; choose another name.")
    changed = {
        root / path: edit(_read(root, path), name)
        for path, edit in (
            (MIXERS_FILE, _among_mixers),
            (NAMES_FILE, _among_names),
            (TESTS_FILE, _among_tests),
            (README_FILE, _in_readme),
        )
    }
    _check_new(new)
    _check_unbound(name, _read(root, MIXERS_FILE), str(MIXERS_FILE))
    _write_all({new: text, **changed})
    return [new, *changed]


def _check_unbound(name: str, text: str, where: str) -> None:
    """Raise UserError where the class of a mixer is called as what a file has already: it would take its place."""
    words = re.findall(r"^from .* import (.*)$|^(?:class|def) (\w+)|^(\w+) ?[:=]", text, re.MULTILINE)
    if class_name(name) in {word for found in words for part in found for word in part.split(", ")}:
        raise UserError(f"The class of '{name}' would be {class_name(name)}, which {where} has; choose another name.")


def _write_all(contents: Mapping[Path, str]) -> None:
    """Write files, all of them or none.

    Raises:
      UnwritableError: the file system refuses one.
    """
    before = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in contents}
    written: list[Path] = []
    try:
        for path, content in contents.items():
            write_whole(path, content)
            written.append(path)
    except BaseException:
        for path in written:
            text = before[path]
            path.unlink() if text is None else write_whole(path, text)
        raise


def _check_new(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"'{path}' is there already, and stays as it is; choose another name.")
    if not path.parent.is_dir():
        raise UserError(f"'{path}' cannot be written: there is no folder '{path.parent}'.")


def _read(root: Path, path: Path) -> str:
    try:
        return (root / path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"'{root}' is no checkout of based_jax ({path}: {reason(error)}); with --file=FILE.py the mixer gets a file"
            " of its own."
        ) from None


def _among_mixers(text: str, name: str) -> str:
    """Return the table of mixers with its import and its line, in their orders."""
    line = f"from based_jax.nn.mixers.{name} import {class_name(name)}"
    text = _sorted_in(text, line, r"from based_jax\.nn\.mixers\.\w+ import \w+")
    return _sorted_in(text, f'    "{name}": {class_name(name)},', r'    "\w+": \w+,')


def _among_names(text: str, name: str) -> str:
    """Return the table of families with the mixer's last."""
    return _last_of(text, f'    "{name}": "{_title(name)}",', r'    "\w+": "[^"]+",')


def _among_tests(text: str, name: str) -> str:
    return _sorted_in(text, f'    "{name}": {TEST_OPTIONS},', r'    "\w+": \{.*\},')


def _in_readme(text: str, name: str) -> str:
    line = f"| `{name}` | {_title(name)}: what it is | {STATE} | where it is published |"
    return _last_of(text, line, r"\| `\w+`.*\|")


def _sorted_in(text: str, line: str, like: str) -> str:
    """Return a text with a line before the first of its first run of such lines that comes after it."""
    lines = text.split("\n")
    first, last = _run_of(lines, like)
    place = next((i for i in range(first, last) if lines[i] > line), last)
    return "\n".join([*lines[:place], line, *lines[place:]])


def _last_of(text: str, line: str, like: str) -> str:
    """Return a text with a line behind its first run of such lines."""
    lines = text.split("\n")
    _, last = _run_of(lines, like)
    return "\n".join([*lines[:last], line, *lines[last:]])


def _run_of(lines: list[str], like: str) -> tuple[int, int]:
    """Return where the first run of lines of a form begins, and where it ends."""
    fits = [re.fullmatch(like, line) is not None for line in lines]
    first = fits.index(True)
    return first, next(i for i in range(first, len(lines) + 1) if i == len(lines) or not fits[i])


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()

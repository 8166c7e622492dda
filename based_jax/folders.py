"""Folders that are read and written: one rule of what may name them, and errors of the file system as sentences."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from based_jax.errors import UserError


class UnwritableError(UserError):
    """The file system refused to write: a full disk, a read-only folder."""


def local_folder(path: str | os.PathLike, what: str = "workdir") -> Path:
    """Return the path of a folder that this machine's file systems hold, or may hold.

    Args:
      path: as a user gives it.
      what: names it in the sentence.

    Raises:
      UserError: the path is empty, or the address of something elsewhere, such as 'gs://bucket/run'.
    """
    name = os.fspath(path)
    if not name.strip():
        raise UserError(f"{what} is '{name}'; name a folder ('.' is the current one).")
    if found := re.match(r"(\w+):/", name):
        raise UserError(
            f"{what} is '{name}', an address of '{found[1]}'; it is a folder of this machine (a bucket can be mounted)."
        )
    if "\0" in name:
        raise UserError(f"{what} is {name!r}; a path has no zero byte.")
    return Path(name)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
      UserError: a file is in the way, or the file system refuses.
    """
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
    except UnwritableError as error:
        if isinstance(error.__cause__, FileExistsError | NotADirectoryError):
            raise UserError(f"'{path}' cannot be a folder: a file is in the way.") from error.__cause__
        raise


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn an error of the file system into the sentence that `path` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"'{os.fspath(path)}' cannot be written: {reason(error)}.") from error


def reason(error: OSError) -> str:
    """Return what the file system says: 'No space left on device'."""
    return error.strerror or str(error)

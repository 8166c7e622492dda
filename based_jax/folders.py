"""Folders that are read and written: one rule of what may name a path, and errors of the file system as sentences."""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from based_jax.errors import UserError

MAX_NAME_BYTES = 255
"""Of a file or a folder, on Linux and macOS."""


class UnwritableError(UserError):
    """The file system refused to write: a full disk, a read-only folder."""


def local_path(path: str | os.PathLike, what: str = "workdir") -> Path:
    """Return a path that this machine's file systems hold, or may hold; `~` is the home folder.

    Args:
      path: of a folder or a file, as a user gives it.
      what: names it in the sentence.

    Raises:
      UserError: it is no path, is empty, or is the address of something elsewhere, such as 'gs://bucket/run'.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{what} is {path!r:.80}; it is a path.")
    name = os.fspath(path)
    if not name.strip():
        raise UserError(f"{what} is '{name}', which names nothing ('.' is the current folder).")
    if found := re.match(r"(\w+):/", name):
        raise UserError(
            f"{what} is '{name}', an address of '{found[1]}'; it is on this machine (a bucket can be mounted)."
        )
    if "\0" in name:
        raise UserError(f"{what} is {name!r}; a path has no zero byte.")
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        raise UserError(f"{what} is {name!r}, which no file system can hold.") from None
    if max(map(len, parts)) > MAX_NAME_BYTES:
        raise UserError(f"{what} is {name!r:.80}..., of which a part is longer than {MAX_NAME_BYTES} bytes.")
    return Path(name).expanduser()


def check_utf8(path: str | os.PathLike) -> None:
    """Raise UserError for a folder whose whole path is no UTF-8, in which Orbax can neither write nor read."""
    name = os.path.abspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name!r} is no UTF-8, which the path of a checkpoint is; choose another folder.") from None


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


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
      UnwritableError: the file system refuses.
    """
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def check_free(path: Path) -> None:
    """Raise UserError for a target that is there, unless it is an empty folder."""
    try:
        free = not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {reason(error)}.") from None
    if not free:
        raise UserError(f"'{path}' is not empty; name a new one.")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path beside the target, which becomes it at the end; whatever goes wrong leaves neither.

    Raises:
      UserError: the target is not free, or cannot be written.
    """
    part = path.absolute().with_name(f".{path.absolute().name}.part")
    try:
        check_free(path)
        part.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        part.mkdir()  # what refuses it is told here: Orbax would leave coroutines behind that nobody awaits
        part.rmdir()
        yield part
        os.replace(part, path)
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: TensorStore's for errors of the file system
        raise UserError(f"'{path}' cannot be written: {reason(error)}.") from None
    finally:
        with contextlib.suppress(OSError):
            _remove(part)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_file(path: str | os.PathLike) -> bytes:
    """Return the content of a file: nobody may ever write into a pipe, and a device may have no end.

    Raises:
      OSError: it cannot be read, or is neither a file nor a folder.
    """
    check_file(path)
    return Path(path).read_bytes()


def check_file(path: str | os.PathLike) -> None:
    """Raise the OSError of a path that is not there, or is a pipe, a socket or a device."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "It is a pipe or a device, not a file")


def reason(error: Exception) -> str:
    """Return what the file system says, without a full stop: 'No space left on device'.

    Of an error of a library it is found by the number that its message holds.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    number = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)|os_error_code='(\d+)'", text)
    return os.strerror(int(number[number.lastindex or 0])) if number else text

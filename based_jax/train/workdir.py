"""The folder of a run: what may stand in it, and who trains in it."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from based_jax.config import CONFIG_FILE
from based_jax.errors import UserError
from based_jax.folders import local_path, make_folder, read_file, reason, writing
from based_jax.train.files import read_lines

log = logging.getLogger(__name__)

METRICS_FILE, SAMPLES_FILE, GOODPUT_FILE, LOCK_FILE = "metrics.jsonl", "samples.jsonl", "goodput.jsonl", "train.lock"
CHECKPOINTS_FOLDER = "checkpoints"


def checked_workdir(workdir: str | os.PathLike) -> Path:
    """Return the path of a workdir, new or old, in which nothing is in a run's way; nothing is written.

    Raises:
      UserError: it is no folder of this machine, or cannot be written, or holds something else where a run has its
        files and its folder.
    """
    path = local_path(workdir)
    with writing(path):
        there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        if not there.is_dir():
            raise UserError(f"'{path}' cannot be a workdir: '{there}' is no folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"'{path}' cannot be written: {os.strerror(13)}.")
        for name in (CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, GOODPUT_FILE, LOCK_FILE):
            if (path / name).exists() and not (path / name).is_file():
                raise UserError(f"'{path / name}' is no file, where a run has one; choose another workdir.")
        checkpoints = path / CHECKPOINTS_FOLDER
        if os.path.lexists(checkpoints) and not checkpoints.is_dir():
            raise UserError(f"'{checkpoints}' is a file, where a run has a folder; choose another workdir.")
        for name in (METRICS_FILE, GOODPUT_FILE):
            read_lines(path / name)
    return path


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Make a workdir and keep other trainings out of it, until the process ends, however it does.

    The lock is the system's (flock), so one that a dead process left holds nobody up, and reading beside a run stays
    possible; the file says who holds it. A file system without locks is warned of.

    Raises:
      UserError: another training holds it, or it cannot be written.
    """
    make_folder(workdir)
    path = workdir / LOCK_FILE
    lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"'{workdir}' is trained in by {_owner(path)}; wait for it, or choose another workdir."
        ) from None
    except (OSError, NotImplementedError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        log.warning("'%s' cannot be locked (%s): see to it that nothing else trains in '%s'.", path, why, workdir)
    try:
        if lock.is_locked:
            with writing(path):
                path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def wait_for_trainings(workdir: Path) -> None:
    """Wait until nobody trains in a workdir, where the file system has locks: who is stopped saves first."""
    with (
        contextlib.suppress(OSError, NotImplementedError),
        filelock.FileLock(workdir / LOCK_FILE, fallback_to_soft=False),
    ):
        pass


def _owner(path: Path) -> str:
    """Return who holds a lock file, in words."""
    try:
        owner = json.loads(read_file(path))
        return f"process {owner['pid']} of host '{owner['host']}'"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

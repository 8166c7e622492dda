"""What of a text task can be known before its corpus is read; imports nothing heavy."""

import os
from pathlib import Path

from based_jax.data.checks import check_ints, check_seed
from based_jax.data.corpus import TFDS_PREFIX
from based_jax.errors import UserError
from based_jax.folders import local_path

MAX_PROCESSES = 1024


def check_text(
    path: str | os.PathLike | None,
    text_feature: str | None,
    seq_len: int,
    seed: int,
    cache_dir: str | os.PathLike | None,
    processes: int,
) -> None:
    """Check what can be known of a text task before its corpus is read.

    Raises:
      UserError: a name is empty or of a remote place, a text feature is asked of a folder, or a number is impossible.
    """
    for name, value in {"path": path, "cache_dir": cache_dir}.items():
        if value is not None and not is_tfds(value):
            local_path(value, name)
    if text_feature is not None and not is_tfds(path):
        raise UserError(
            f"text_feature is '{text_feature}', but the path '{path}' is not {TFDS_PREFIX}NAME; it is None there."
        )
    check_ints(seq_len=seq_len, processes=processes)
    if seq_len < 1:
        raise UserError(f"seq_len is {seq_len}; it is at least 1.")
    if not 1 <= processes <= MAX_PROCESSES:
        raise UserError(f"processes is {processes}; it is 1 to {MAX_PROCESSES}.")
    check_seed(seed, below=2**64)


def is_tfds(path: object) -> bool:
    """Return whether a corpus' path names a dataset of tensorflow-datasets."""
    return str(path).startswith(TFDS_PREFIX)


def located(path: str | None) -> str | None:
    """Return the absolute path of a folder; what names none stays."""
    return path if path is None or is_tfds(path) else str(absolute(path, "path"))


def absolute(path: str | os.PathLike, what: str) -> Path:
    """Return the absolute form of a path of this machine, which is called so in messages."""
    return Path(os.path.abspath(local_path(path, what)))

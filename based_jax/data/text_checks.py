"""What of a text task can be known before its corpus is read; imports nothing heavy."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from based_jax.data.checks import check_ints, check_seed
from based_jax.data.corpus import TFDS_PREFIX
from based_jax.errors import UserError
from based_jax.folders import local_path

MAX_PROCESSES = 1024
LEAST_SHARE = 1e-6
"""Of a part's weight in the largest one."""


@dataclasses.dataclass(frozen=True)
class TextPart:
    """A corpus of a mixture.

    Attributes:
      path: a folder, or "tfds:NAME", as that of a task on one corpus.
      weight: the corpus has this of the sum of all weights as its share of the rows; shares are right to a hundredth of
        the smallest one.
      text_feature: the key, column or feature that holds a document, as that of a task on one corpus.
    """

    path: str
    weight: float = 1.0
    text_feature: str | None = None

    @property
    def located(self) -> "TextPart":
        """The same corpus, whatever the current folder is."""
        return dataclasses.replace(self, path=located(self.path))


Mixture = Mapping[str, TextPart]
"""Parts by the names that their metrics have."""


def check_text(
    path: str | os.PathLike | None,
    text_feature: str | None,
    mixture: Mixture | None,
    seq_len: int,
    seed: int,
    cache_dir: str | os.PathLike | None,
    processes: int,
) -> None:
    """Check what can be known of a text task before its corpus is read.

    Raises:
      UserError: a name is empty or of a remote place, a mixture is none, or a number is impossible.
    """
    for name, value in {"path": path, "cache_dir": cache_dir}.items():
        _check_path(value, name)
    _check_feature(text_feature, "text_feature")
    if text_feature is not None and path is None:
        raise UserError(f"text_feature is '{text_feature}', but path is None; it is of the corpus that path names.")
    if mixture is not None:
        _check_mixture(mixture, path)
    check_ints(seq_len=seq_len, processes=processes)
    if seq_len < 1:
        raise UserError(f"seq_len is {seq_len}; it is at least 1.")
    if not 1 <= processes <= MAX_PROCESSES:
        raise UserError(f"processes is {processes}; it is 1 to {MAX_PROCESSES}.")
    check_seed(seed, below=2**64)


def _check_mixture(mixture: Mixture, path: str | os.PathLike | None) -> None:
    if path is not None:
        raise UserError(f"path is '{path}', but there is a mixture, whose parts have paths; one of the two is None.")
    if not mixture:
        raise UserError("mixture is {}; it has a part, such as {'wiki': {'path': 'my_texts', 'weight': 1.0}}.")
    for name, part in mixture.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"mixture has a part '{name}'; a name is of letters, digits, '_' and '-'.")
        _check_path(part.path, f"mixture.{name}.path")
        _check_feature(part.text_feature, f"mixture.{name}.text_feature")
        if not 0 < part.weight < math.inf:
            raise UserError(f"mixture.{name}.weight is {part.weight}; it is a number above 0.")
    if not sum(part.weight for part in mixture.values()) < math.inf:
        raise UserError("mixture has weights whose sum is beyond the largest float; their proportions alone count.")
    least = min(mixture, key=lambda name: mixture[name].weight)
    if mixture[least].weight < LEAST_SHARE * max(part.weight for part in mixture.values()):
        raise UserError(
            f"mixture.{least}.weight is {mixture[least].weight}, under a millionth of the largest; leave the part out."
        )


def _check_path(path: str | os.PathLike | None, what: str) -> None:
    if path is not None and not is_tfds(path):
        local_path(path, what)


def _check_feature(text_feature: str | None, what: str) -> None:
    if text_feature == "":
        raise UserError(f"{what} is '', which names nothing; it is a key, a column or a feature, or None for 'text'.")


def is_tfds(path: object) -> bool:
    """Return whether a corpus' path names a dataset of tensorflow-datasets."""
    return str(path).startswith(TFDS_PREFIX)


def located(path: str) -> str:
    """Return the absolute path of a folder; what names none stays."""
    return path if is_tfds(path) else str(absolute(path, "path"))


def absolute(path: str | os.PathLike, what: str) -> Path:
    """Return the absolute form of a path of this machine, which is called so in messages."""
    return Path(os.path.abspath(local_path(path, what)))

"""A corpus: a folder of text files, folders in it too; `data/documents.py` says which files.

Files with a word such as `val`, `dev` or `test` in their name, or in a folder of that name, are the validation split.
Where there are none, `data/holdout.py` holds text out of training.
"""

import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from based_jax.data.documents import (
    SUFFIXES_WITH_FEATURES,
    TEXT_FEATURE,
    TEXT_SUFFIXES,
    Chunk,
    Reading,
    read_documents,
    suffix_of,
)
from based_jax.data.token_files import TOKEN_SUFFIXES
from based_jax.errors import UserError

TextSplit = Literal["train", "validation"]
TFDS_PREFIX = "tfds:"
CORPUS_SUFFIXES = (*TEXT_SUFFIXES, *TOKEN_SUFFIXES)
SPLITS_BY_WORD: dict[str, TextSplit] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "devset", "heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "tests", "testset", "eval", "evaluation"), "validation"),
}


def default_corpus() -> Path:
    """Return the folder of the shipped public-domain prose (see its SOURCE.md)."""
    return Path(__file__).parent / "assets" / "corpus"


class Corpus(Protocol):
    """Documents to train on and to validate with."""

    @property
    def location(self) -> str:
        """Where it is, whatever the current folder."""
        ...

    @property
    def extent(self) -> int:
        """What `Reading.position` counts to: bytes of files, or examples."""
        ...

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of what stands beside the text and is not read."""
        ...

    def file_hashes(self) -> Mapping[str, str]:
        """Return the sha256 of each file by its name: they change with any name or content."""
        ...

    def chunks(self, split: TextSplit, reading: Reading) -> Iterator[Chunk]:
        """Yield the documents of a split in order; the validation split may have none."""
        ...


@dataclasses.dataclass(frozen=True)
class CorpusFolder:
    """The files of a folder, and of the folders in it, that end in one of some suffixes.

    Every property and method raises UserError where the folder or a file of it cannot be read, or holds nothing.
    """

    suffixes: ClassVar[tuple[str, ...]]
    folder: str | os.PathLike

    def __str__(self):
        return str(self.folder)

    @property
    def location(self) -> str:
        """The absolute path."""
        return str(Path(self.folder).absolute())

    @property
    def extent(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def is_empty(self) -> bool:
        """Whether there is no file of these suffixes."""
        return not self._listing[0]

    @cached_property
    def files(self) -> list[Path]:
        """The files, by name; there is one to train on."""
        files = self._listing[0]
        if not files:
            found = f"; there is {shortened(self.left_out)}" if self.left_out else ""
            raise UserError(f"Corpus '{self}' has no file that ends in {', '.join(CORPUS_SUFFIXES)}{found}.")
        if not any(self.split_of(path) == "train" for path in files):
            raise UserError(f"Corpus '{self}' has validation files only; it needs one to train on.")
        return files

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the files and folders that hold nothing by their names, or are hidden."""
        return self._listing[1]

    def files_of(self, split: TextSplit) -> list[Path]:
        """Return the files that belong to a split; that of validation may have none."""
        return [path for path in self.files if self.split_of(path) == split]

    def file_hashes(self) -> dict[str, str]:
        """Return the sha256 of each file by its name below the folder."""
        return {self._name(path): hash_file(path) for path in self.files}

    def split_of(self, path: Path) -> TextSplit:
        """Return the split that the file's name, else the nearest folder that is named for one, says."""
        stem = path.name.lower().removesuffix(suffix_of(path, self.suffixes) or "")
        words = {SPLITS_BY_WORD[word] for word in re.findall("[a-z]+", stem) if word in SPLITS_BY_WORD}
        if words:
            return "train" if "train" in words else "validation"
        folders = reversed(path.relative_to(self.folder).parts[:-1])
        return next((SPLITS_BY_WORD[name.lower()] for name in folders if name.lower() in SPLITS_BY_WORD), "train")

    @cached_property
    def _listing(self) -> tuple[list[Path], tuple[str, ...]]:
        folder = Path(self.folder)
        if not folder.is_dir():
            raise UserError(f"Corpus '{self}' is no folder; it holds files ending in {', '.join(CORPUS_SUFFIXES)}.")
        files: list[Path] = []
        left_out: list[Path] = []
        for path in _walk(folder):
            (files if _is_one_of(path, self.suffixes) else left_out).append(path)
        files.sort(key=lambda path: path.parts)
        return files, tuple(sorted(self._name(path) for path in left_out))

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.folder).as_posix()
        return name.encode(errors="backslashreplace").decode()


@dataclasses.dataclass(frozen=True)
class FolderCorpus(CorpusFolder):
    """The text files of a folder; the documents of those with keys or columns stand under `text_feature`."""

    suffixes = TEXT_SUFFIXES
    text_feature: str | None = None

    def file_hashes(self) -> dict[str, str]:
        """Return the sha256 of each file by its name below the folder, and the name of the feature where it is given.

        Raises:
          UserError: as the others, or no file has features.
        """
        if self.text_feature is None:
            return super().file_hashes()
        if not any(suffix_of(path, SUFFIXES_WITH_FEATURES) for path in self.files):
            raise UserError(
                f"text_feature is '{self.text_feature}', but corpus '{self}' has .txt files alone; it is None there."
            )
        return super().file_hashes() | {"text_feature": self.text_feature}

    def chunks(self, split: TextSplit, reading: Reading) -> Iterator[Chunk]:
        """Yield the documents of the files that belong to a split."""
        for path in self.files_of(split):
            yield from read_documents(path, reading, self.text_feature or TEXT_FEATURE)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file; UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"Corpus file '{path}' cannot be read: {error.strerror}.") from None


def combined_hash(hashes: Mapping[str, str], *more: object) -> str:
    """Return 16 hexadecimal digits that change with any file's name or hash, and with what more is given."""
    return hashlib.sha256(repr((sorted(hashes.items()), more)).encode()).hexdigest()[:16]


def shortened(names: tuple[str, ...], most: int = 20) -> str:
    """Return names as the part of a sentence, no more than `most` of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _walk(folder: Path) -> Iterator[Path]:
    """Yield files, and those folders that are not entered: hidden ones, and links to a folder that was entered."""
    entered = {folder.resolve()}

    def refuse(error: OSError):
        raise UserError(f"Corpus folder '{error.filename}' cannot be read: {error.strerror}.")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        inside = {Path(place, name): Path(place, name).resolve() for name in sorted(folders)}
        folders[:] = []
        for path, real in inside.items():
            if path.name.startswith(".") or real in entered:
                yield path
            else:
                entered.add(real)
                folders.append(path.name)
        yield from (Path(place, name) for name in files)


def _is_one_of(path: Path, suffixes: tuple[str, ...]) -> bool:
    if suffix_of(path, suffixes) is None or path.name.startswith("."):
        return False
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:  # a link to nothing, too
        raise UserError(f"Corpus file '{path}' cannot be read: {error.strerror}.") from None

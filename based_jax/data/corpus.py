"""A corpus: a folder of text files, one document each (.txt) or one a line (.jsonl), plain or compressed (.xz, .gz).

Files whose names begin with `val` or `test` are the validation split. Where there are none, documents go there by the
hash of their text, about one in a hundred and at least one; of a single document it is the last twentieth.
"""

import dataclasses
import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from based_jax.errors import UserError

TEXT_SUFFIXES = (".txt", ".jsonl", ".txt.xz", ".jsonl.xz", ".txt.gz", ".jsonl.gz")
OPENERS_BY_SUFFIX: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
VALIDATION_NAMES = ("val", "test")
VALIDATION_SHARE = 100


def default_corpus() -> Path:
    """Return the folder of the shipped public-domain prose (see its SOURCE.md)."""
    return Path(__file__).parent / "assets" / "corpus"


class Corpus(Protocol):
    """Documents to train on and to validate with."""

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with any name or content."""
        ...

    def split_documents(self) -> dict[str, list[str]]:
        """Return {"train": documents, "validation": documents}, neither empty."""
        ...


@dataclasses.dataclass(frozen=True)
class FolderCorpus:
    """The text files of a folder."""

    folder: str | os.PathLike

    def __str__(self):
        return str(self.folder)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with any name or content.

        Raises:
          UserError: the folder does not exist or holds no text file.
        """
        return hash_files(corpus_files(self.folder))

    def split_documents(self) -> dict[str, list[str]]:
        """Return {"train": documents, "validation": documents}.

        Raises:
          UserError: a file is empty, is not UTF-8 text or holds a broken line, or there is nothing to train on.
        """
        train: list[str] = []
        validation: list[str] = []
        for path in corpus_files(self.folder):
            (validation if path.name.startswith(VALIDATION_NAMES) else train).extend(read_documents(path))
        if not train:
            raise UserError(f"Corpus '{self.folder}' has validation files only; it needs one to train on.")
        if not validation:
            train, validation = hold_out(train)
        return {"train": train, "validation": validation}


def corpus_files(folder: str | os.PathLike) -> list[Path]:
    """Return the text files of a corpus by name.

    Raises:
      UserError: the folder does not exist or holds no text file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"Corpus '{folder}' is no folder; it holds files ending in {', '.join(TEXT_SUFFIXES)}.")
    files = sorted(path for path in folder.iterdir() if path.name.endswith(TEXT_SUFFIXES))
    if not files:
        raise UserError(f"Corpus '{folder}' has no text file; it holds files ending in {', '.join(TEXT_SUFFIXES)}.")
    return files


def hash_files(paths: Iterable[Path], also: str = "") -> str:
    """Return 16 hexadecimal digits that change with any file's name or content, and with `also`."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    digest.update(also.encode())
    return digest.hexdigest()[:16]


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of one file.

    Raises:
      UserError: as `FolderCorpus.split_documents`.
    """
    count = 0
    try:
        with OPENERS_BY_SUFFIX.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for text in _documents(file, path):
                count += 1
                yield text
    except UnicodeDecodeError as error:
        raise UserError(f"Corpus file '{path}' is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"Corpus file '{path}' cannot be read: {error}.") from None
    if not count:
        raise UserError(f"Corpus file '{path}' is empty; it needs at least one document.")


def _documents(file: TextIO, path: Path) -> Iterator[str]:
    if ".jsonl" not in path.suffixes:
        text = file.read()
        yield from [text] if text.strip() else []
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _text_of(line, path, number)


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str) or not text:
        raise UserError(f"Corpus file '{path}', line {number}, is no JSON object with a \"text\": {line[:40]!r}.")
    return text


def hold_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return (train, validation) by the hash of each text, so that neither order nor additions move a document."""
    if len(documents) == 1:
        cut = len(documents[0]) * 19 // 20
        return [documents[0][:cut]], [documents[0][cut:]]
    hashes = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) for text in documents]
    held = [value % VALIDATION_SHARE == 0 or value == min(hashes) for value in hashes]
    return [d for d, h in zip(documents, held, strict=True) if not h], [
        d for d, h in zip(documents, held, strict=True) if h
    ]

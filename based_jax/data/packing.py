"""A corpus as tokens on disk, made once for each tokenizer and read by runs of any window length.

Documents stream through the tokenizer in pieces, a batch at a time, so memory does not grow with the corpus. A packing
is whole or absent: it is written beside its place and renamed.
"""

import contextlib
import dataclasses
import errno
import json
import operator
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from based_jax.data.corpus import Corpus, FolderCorpus, TextSplit, combined_hash
from based_jax.data.documents import Reading
from based_jax.data.files_of_text import encoded_files
from based_jax.data.holdout import split_chunks
from based_jax.data.pieces import Encoded, encoded_chunks
from based_jax.data.progress import Progress
from based_jax.data.token_corpus import TokenCorpus
from based_jax.data.tokenizer import TextTokenizer
from based_jax.data.tokens import TokenStream, TokenWriter, checked_facts, damaged, facts, token_dtype
from based_jax.errors import UserError
from based_jax.folders import read_file

CACHE_VARIABLE = "BASED_JAX_CACHE"
FORMAT = 2
INDEX = "index.json"
SPLITS: tuple[TextSplit, ...] = ("train", "validation")
PATIENCE_SECONDS = 5


def default_cache_dir() -> Path:
    """Return where packed text is kept: $BASED_JAX_CACHE, or based_jax in the user's cache folder.

    Raises:
      UserError: there is no home folder that would hold it.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "based_jax"
    except RuntimeError:
        raise UserError(f"There is no home folder for packed text; set data.cache_dir or ${CACHE_VARIABLE}.") from None


@dataclasses.dataclass(frozen=True)
class PackedFolder:
    """A corpus that is there packed alone: what `PackedText.open` made, wherever it lies by now."""

    folder: Path

    def __str__(self):
        return str(self.folder)

    @property
    def location(self) -> str:
        """The absolute path."""
        return str(self.folder.absolute())

    left_out = ()

    @property
    def exists(self) -> bool:
        """Whether the folder holds packed text, or what a copy that was cut short has of it."""
        return any((self.folder / f"{split}.tokens").is_file() for split in SPLITS)


AnyCorpus = Corpus | TokenCorpus | PackedFolder


@dataclasses.dataclass(frozen=True)
class PackedText:
    """Tokens of both splits of a corpus, and what there is to know of them.

    Attributes:
      folder: where they are.
      index: what `facts` says of each split, what was left out, the tokenizer's fingerprint (None in older ones), and
        the sha256 of each file of the corpus.
    """

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, corpus: AnyCorpus, tokenizer: TextTokenizer, cache_dir: Path, processes: int = 1) -> "PackedText":
        """Return the packed text of a corpus, built by so many processes unless it is there.

        Reading it neither writes nor locks.

        Raises:
          UserError: the corpus is bad (nothing is written then) or was packed by another tokenizer, or the cache cannot
            be read or written.
        """
        if isinstance(corpus, PackedFolder):
            return cls(corpus.folder, _checked_index(corpus, tokenizer))
        hashes = corpus.file_hashes()
        folder = cache_dir / "packed_text" / combined_hash(hashes, tokenizer.fingerprint, FORMAT)
        if not (folder / INDEX).exists():
            try:
                _build(folder, corpus, hashes, tokenizer, processes)
            except OSError as error:
                raise UserError(
                    f"Packed text cannot be written to '{cache_dir}': {error.strerror or error}; "
                    f"choose another folder by data.cache_dir or ${CACHE_VARIABLE}."
                ) from None
        return cls(folder, _read_index(folder) | {"files": dict(hashes)})

    def stream(self, split: TextSplit) -> TokenStream:
        """Return the tokens of a split."""
        known = self.index["splits"][split]
        path = self.folder / f"{split}.tokens"
        return TokenStream(path, token_dtype(self.index["vocab_size"]), known["tokens"], known["checksums"])

    def count(self, split: TextSplit, what: str) -> int:
        """Return how many "tokens" or "documents" a split has."""
        return self.index["splits"][split][what]

    @property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with any token of either split, and with nothing else."""
        return combined_hash({split: known["sha256"] for split, known in self.index["splits"].items()})


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads(read_file(folder / INDEX).decode())
        splits = {split: checked_facts(index["splits"][split]) for split in SPLITS}
        counts = {name: operator.index(index[name]) for name in ("vocab_size", "blank", "mended")}
        later = {"tokenizer": index.get("tokenizer"), "files": dict(index.get("files", {}))}
        return {"splits": splits} | counts | later
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(folder, f"{INDEX}: {type(error).__name__}") from None


def _checked_index(packed: PackedFolder, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Return the index of packed text without its corpus; UserError where it has ids of another tokenizer."""
    index = _read_index(packed.folder)
    if index["vocab_size"] != tokenizer.vocab_size or index["tokenizer"] not in (None, tokenizer.fingerprint):
        raise UserError(f"Packed text '{packed}' has ids of another tokenizer than data.tokenizer.")
    return index


def _build(
    folder: Path,
    corpus: Corpus | TokenCorpus,
    hashes: Mapping[str, str],
    tokenizer: TextTokenizer,
    processes: int,
) -> None:
    """Write the packed text into `folder` unless another process does so first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if (folder / INDEX).exists():
            return
        part = folder.with_name(f"{folder.name}.part")
        for left in (part, folder):  # of a process that was killed, and without an index
            shutil.rmtree(left, ignore_errors=True)
        try:
            part.mkdir()
            index = _pack(part, corpus, tokenizer, processes) | {"files": dict(hashes)}
            (part / INDEX).write_text(json.dumps(index), encoding="utf-8")
            part.replace(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except filelock.Timeout:
        print("Another process packs the same text: waiting for it.", flush=True)
        lock.acquire()
    except NotImplementedError as error:
        raise OSError(errno.ENOLCK, f"it cannot be locked ({error})") from None
    try:
        yield
    finally:
        lock.release()


def _pack(folder: Path, corpus: Corpus | TokenCorpus, tokenizer: TextTokenizer, processes: int) -> dict[str, Any]:
    """Write the tokens of both splits into a folder and return its index."""
    dtype, reading = token_dtype(tokenizer.vocab_size), Reading()
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(contextlib.closing(Progress(f"Packing '{corpus}'", corpus.extent)))
        paths = {split: folder / f"{split}.tokens" for split in SPLITS}
        files = {split: stack.enter_context(path.open("wb")) for split, path in paths.items()}
        writers = {split: TokenWriter(file, dtype, tokenizer.end_of_text) for split, file in files.items()}
        found = _encoded(corpus, tokenizer, reading, processes, folder)
        for split, ids, position in stack.enter_context(contextlib.closing(found)):
            writers[split].write(ids)
            progress.update(position, sum(writer.tokens for writer in writers.values()))
    return {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "splits": {split: facts(paths[split], writers[split], dtype) for split in SPLITS},
        "blank": reading.blank,
        "mended": reading.mended,
    }


def _encoded(
    corpus: Corpus | TokenCorpus, tokenizer: TextTokenizer, reading: Reading, processes: int, folder: Path
) -> Generator[Encoded]:
    """Yield the ids of a corpus: of text in files or in batches of it, which processes share."""
    if isinstance(corpus, TokenCorpus):
        return _tokens(corpus, tokenizer, reading)
    if processes > 1 and isinstance(corpus, FolderCorpus) and len(corpus.files) >= processes:
        return encoded_files(corpus, reading, tokenizer, processes, folder)
    return encoded_chunks(split_chunks(corpus, reading), reading, tokenizer, processes)


def _tokens(corpus: TokenCorpus, tokenizer: TextTokenizer, reading: Reading) -> Generator[Encoded]:
    for split, ids in corpus.blocks(tokenizer, reading):
        yield Encoded(split, ids, reading.position)

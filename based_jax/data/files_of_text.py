"""Files of text to ids by several processes, each of which reads, holds out and encodes whole files.

What a process makes of a file it writes beside the packed text, where it is read in the order of the files: the ids are
those that one process makes of them one after the other.
"""

import collections
import contextlib
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np

from based_jax.data.corpus import FolderCorpus, TextSplit
from based_jax.data.documents import TEXT_FEATURE, Reading, read_documents
from based_jax.data.encoding import BATCHES_AHEAD, Call, calling_processes
from based_jax.data.holdout import HeldOut, has_validation, hold_out, measure, no_text, split_documents
from based_jax.data.pieces import Encoded, encoded_chunks
from based_jax.data.progress import Progress
from based_jax.data.tokenizer import TextTokenizer
from based_jax.data.tokens import token_dtype

TOKENS_AT_ONCE = 2**20


class FileOfText(NamedTuple):
    """A file to be encoded, and where its ids go.

    Attributes:
      path, feature: of its documents, see `read_documents`.
      split: which all of it is of; None where some of it is held out.
      held: what of its documents goes to validation, then.
      ids: files that are written, by split.
    """

    path: Path
    feature: str
    split: TextSplit | None
    held: HeldOut | None
    ids: dict[TextSplit, Path]


def encoded_files(
    corpus: FolderCorpus, reading: Reading, tokenizer: TextTokenizer, processes: int, folder: Path
) -> Generator[Encoded]:
    """Yield the ids of a corpus, as `encoded_chunks` does of its `split_chunks`; files of ids come and go in a folder.

    Raises:
      UserError: a file is damaged, a process died, or there is nothing to train on.
      OSError: a file of ids cannot be written.
    """
    with calling_processes(tokenizer, processes) as call:
        files = _files(corpus, call, folder)
        for file, counts in _in_order(call, files, BATCHES_AHEAD * processes):
            reading.blank += counts.blank
            reading.mended += counts.mended
            reading.position += file.path.stat().st_size
            for split, path in file.ids.items():
                for ids in _blocks(path, token_dtype(tokenizer.vocab_size)):
                    yield Encoded(split, ids, reading.position)
                path.unlink()


def _in_order(call: Call, files: Iterator[FileOfText], ahead: int) -> Iterator[tuple[FileOfText, Reading]]:
    """Yield files in their order, once they are encoded, with what was met in each; so many wait at most."""
    waiting: collections.deque[tuple[FileOfText, Future[Reading]]] = collections.deque()
    for file in files:
        waiting.append((file, call(encode_file, file)))
        if len(waiting) > ahead:
            first, counts = waiting.popleft()
            yield first, counts.result()
    for first, counts in waiting:
        yield first, counts.result()


def _files(corpus: FolderCorpus, call: Call, folder: Path) -> Iterator[FileOfText]:
    """Yield the files of a corpus in the order of `split_chunks`, each with what is held out of it."""
    feature = corpus.text_feature or TEXT_FEATURE
    whole = has_validation(corpus)
    splits: tuple[TextSplit, ...] = ("validation", "train") if whole else ("train",)
    places = [(split, path) for split in splits for path in corpus.files_of(split)]
    held = [None] * len(places) if whole else _held_out(corpus, call, feature)
    for number, ((split, path), part) in enumerate(zip(places, held, strict=True)):
        ids: dict[TextSplit, Path] = {name: folder / f"{number}.{name}.ids" for name in ("train", "validation")}
        yield FileOfText(path, feature, split if whole else None, part, ids)


def _held_out(corpus: FolderCorpus, call: Call, feature: str) -> list[HeldOut]:
    """Return what of each file of training goes to validation, which all of them decide together."""
    paths = corpus.files_of("train")
    jobs = [call(measure_file, path, feature) for path in paths]
    found, read = [], 0
    with contextlib.closing(Progress(f"Reading '{corpus}'", corpus.extent)) as progress:
        for path, job in zip(paths, jobs, strict=True):
            found.append(job.result())
            read += path.stat().st_size
            progress.update(read)
    hashes, sizes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if not len(sizes):
        raise no_text(corpus)
    return hold_out(hashes, sizes).of_parts([len(sizes) for _, sizes in found])


def measure_file(tokenizer: TextTokenizer, path: Path, feature: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what `measure` does of a file."""
    return measure(read_documents(path, Reading(), feature))


def encode_file(tokenizer: TextTokenizer, file: FileOfText) -> Reading:
    """Write the ids of a file, and return what was met in it."""
    reading = Reading()
    documents = read_documents(file.path, reading, file.feature)
    chunks = split_documents(documents, file.held, file.split)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(path.open("wb")) for split, path in file.ids.items()}
        for split, ids, _ in encoded_chunks(chunks, reading, tokenizer):
            files[split].write(ids.tobytes())
    return reading


def _blocks(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(block := np.fromfile(file, dtype, TOKENS_AT_ONCE)):
            yield block

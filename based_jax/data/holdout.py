"""Which text is for training and which for validation, where a corpus itself does not say.

Documents go to validation by the hash of their text, about one in a hundred and at least one, so that neither order nor
additions move a document. Where that would be too much or too little of the text (few documents, or very unequal ones)
a twentieth of the characters is held out: documents that fit, and for the rest the end of the longest one.
"""

import contextlib
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from based_jax.data.corpus import Corpus, TextSplit
from based_jax.data.documents import Chunk, Reading
from based_jax.data.progress import Progress
from based_jax.errors import UserError

ONE_DOCUMENT_IN = 100
FITTING_SHARES = (1 / 200, 1 / 10)
MAX_BOUNDARY_CHARACTERS = 1000


class Cut(NamedTuple):
    """A document of which about the last `held` characters go to validation and those before, `kept`, do not."""

    document: int
    kept: int
    held: int


class HeldOut(NamedTuple):
    """What goes to validation: (documents,) bool of those that do as a whole, and of one its end, if any."""

    documents: np.ndarray
    cut: Cut | None = None

    def of_parts(self, counts: Sequence[int]) -> list["HeldOut"]:
        """Return the same of so many documents each, one after the other."""
        ends = np.cumsum(counts)
        return [self._of(slice(end - count, end)) for end, count in zip(ends.tolist(), counts, strict=True)]

    def _of(self, part: slice) -> "HeldOut":
        cut = self.cut if self.cut and part.start <= self.cut.document < part.stop else None
        return HeldOut(self.documents[part], cut and cut._replace(document=cut.document - part.start))


def split_chunks(corpus: Corpus, reading: Reading) -> Iterator[tuple[TextSplit, Chunk]]:
    """Yield all text of a corpus, each chunk with its split.

    Raises:
      UserError: a file is damaged, or there is nothing to train on.
    """
    if has_validation(corpus):
        for split in ("validation", "train"):
            for chunk in corpus.chunks(split, reading):
                yield split, chunk
        return
    hashes, sizes = measure(_shown(corpus))
    if not len(sizes):
        raise no_text(corpus)
    yield from split_documents(corpus.chunks("train", reading), hold_out(hashes, sizes))


def has_validation(corpus: Corpus) -> bool:
    """Return whether a corpus says itself what is for validation."""
    return next(corpus.chunks("validation", Reading()), None) is not None


def no_text(corpus: Corpus) -> UserError:
    """Return the error for a corpus of blank documents."""
    return UserError(f"Corpus '{corpus}' has no text to train on: all its documents are blank.")


def _shown(corpus: Corpus) -> Iterator[Chunk]:
    """Yield the text of training, and show how much of it is read."""
    reading = Reading()
    with contextlib.closing(Progress(f"Reading '{corpus}'", corpus.extent)) as progress:
        for chunk in corpus.chunks("train", reading):
            yield chunk
            progress.update(reading.position)


def measure(chunks: Iterable[Chunk]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash of each document, uint64, and its number of characters."""
    hashes, sizes = array("Q"), array("q")
    digest, size = hashlib.sha256(), 0
    for text, last in chunks:
        digest.update(text.encode())
        size += len(text)
        if last:
            hashes.append(int(digest.hexdigest()[:16], 16))
            sizes.append(size)
            digest, size = hashlib.sha256(), 0
    return np.asarray(hashes, np.uint64), np.asarray(sizes, np.int64)


def hold_out(hashes: np.ndarray, sizes: np.ndarray) -> HeldOut:
    """Return what goes to validation, from each document's hash and its number of characters."""
    held = (hashes % ONE_DOCUMENT_IN == 0) | (hashes == hashes.min())
    total, least, most = sizes.sum(), *FITTING_SHARES
    if not held.all() and least <= sizes[held].sum() / total <= most:
        return HeldOut(held)
    room = target = total - total * 19 // 20
    held = np.zeros(len(sizes), bool)
    for document in np.argsort(hashes, kind="stable"):
        if sizes[document] <= room and len(sizes) > 1:
            held[document] = True
            room -= sizes[document]
    if room <= target // 2:
        return HeldOut(held)
    longest = int(np.lexsort((hashes, -sizes))[0])
    return HeldOut(held, Cut(longest, int(sizes[longest] - room), int(room)))


def split_documents(
    chunks: Iterable[Chunk], held: HeldOut | None, split: TextSplit | None = None
) -> Iterator[tuple[TextSplit, Chunk]]:
    """Yield chunks with their split: that of all of them, or what is held out says."""
    if held is None:
        assert split is not None
        yield from ((split, chunk) for chunk in chunks)
        return
    document = start = 0  # of the chunk: the document it is of, and its first character there
    for chunk in chunks:
        if held.cut and held.cut.document == document:
            yield from _cut(chunk, start, held.cut)
        else:
            yield "validation" if held.documents[document] else "train", chunk
        document, start = (document + 1, 0) if chunk.last else (document, start + len(chunk.text))


def _cut(chunk: Chunk, start: int, cut: Cut) -> Iterator[tuple[TextSplit, Chunk]]:
    """Yield a chunk of the document that is cut, in two where the cut lies in it."""
    text, at = chunk.text, cut.kept - start
    if at <= 0 or at > len(text):
        yield "validation" if at <= 0 else "train", chunk
        return
    first = max(at - min(MAX_BOUNDARY_CHARACTERS, cut.held), 0)
    at = next((found + 1 for mark in "\n " if (found := text.rfind(mark, first, at)) >= 0), at)
    yield "train", Chunk(text[:at], last=True)
    yield "validation", Chunk(text[at:], chunk.last)

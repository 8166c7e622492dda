"""Text to ids by pieces: documents stream through the tokenizer, a batch of their pieces at a time."""

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from based_jax.data.corpus import TextSplit
from based_jax.data.documents import Chunk, Reading
from based_jax.data.encoding import encoded
from based_jax.data.tokenizer import TextTokenizer
from based_jax.data.tokens import token_dtype

PIECE_CHARACTERS = 2**16
BATCH_CHARACTERS = 2**21


class Piece(NamedTuple):
    """A part of a document of a split, cut where its ids do not depend on what stands beside it."""

    split: TextSplit
    text: str
    last: bool


class Encoded(NamedTuple):
    """The next ids of a split, the ends of documents among them, and how much of the corpus is read by then."""

    split: TextSplit
    ids: np.ndarray
    position: int


def encoded_chunks(
    chunks: Iterable[tuple[TextSplit, Chunk]], reading: Reading, tokenizer: TextTokenizer, processes: int = 1
) -> Generator[Encoded]:
    """Yield the ids of chunks in their order, encoded by so many processes; `reading` is of what yields the chunks."""
    end = np.array([tokenizer.end_of_text], token_dtype(tokenizer.vocab_size))
    placed = ((batch, reading.position) for batch in _batches(cut_into_pieces(chunks, tokenizer)))
    with contextlib.closing(encoded(placed, _texts, tokenizer, processes)) as encoding:
        for (batch, position), found in encoding:
            for split, pairs in itertools.groupby(zip(batch, found, strict=True), key=lambda pair: pair[0].split):
                yield Encoded(split, _joined(pairs, end), position)


def _joined(pairs: Iterable[tuple[Piece, np.ndarray]], end: np.ndarray) -> np.ndarray:
    """Return the ids of pieces that follow one another, with `end` behind the last of each document."""
    parts = ((ids, end) if piece.last else (ids,) for piece, ids in pairs)
    return np.concatenate(list(itertools.chain.from_iterable(parts)))


def cut_into_pieces(chunks: Iterable[tuple[TextSplit, Chunk]], tokenizer: TextTokenizer) -> Iterator[Piece]:
    """Yield documents in pieces of about `PIECE_CHARACTERS`, larger ones where the tokenizer finds no place to cut."""
    rest = ""
    for split, (text, last) in chunks:
        rest, start = rest + text, 0
        while (end := _end_of_piece(rest, start, tokenizer)) > start:
            yield Piece(split, rest[start:end], last=False)
            start = end
        rest = rest[start:]
        if last:
            yield Piece(split, rest, last=True)
            rest = ""


def _end_of_piece(text: str, start: int, tokenizer: TextTokenizer) -> int:
    """Return where the piece that begins at `start` ends, or `start` where all that is left is one piece."""
    size = PIECE_CHARACTERS
    while start + size < len(text):
        if (end := tokenizer.last_cut(text, start, start + size)) > start:
            return end
        size *= 2
    return start


def _texts(placed: tuple[list[Piece], int]) -> list[str]:
    return [piece.text for piece in placed[0]]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

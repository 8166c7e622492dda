"""A corpus of tokens: a folder of files that were tokenised elsewhere; `data/token_files.py` says which files.

Documents are what the end-of-text token closes. Files follow one another by name, and a document may go on in the next.
Splits are named as those of text; where no file is for validation, the documents at the end are, about a hundredth of
the tokens.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from based_jax.data.corpus import CorpusFolder, TextSplit
from based_jax.data.documents import Reading
from based_jax.data.token_files import TOKEN_SUFFIXES, TokenFile
from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError

HELD_OUT_SHARE = 100
"""One token in so many is held out."""


@dataclasses.dataclass(frozen=True)
class TokenCorpus(CorpusFolder):
    """The files of tokens in a folder."""

    suffixes = TOKEN_SUFFIXES

    def blocks(self, tokenizer: Tokenizer, reading: Reading) -> Iterator[tuple[TextSplit, np.ndarray]]:
        """Yield the tokens of validation and then those of training, each split's ended by the end of a document.

        Raises:
          UserError: a file is damaged, a token is none of the tokenizer's, or there are none to train on.
        """
        end = tokenizer.end_of_text
        if sum(file.tokens for file in self._files["validation"]):
            yield from _closed("validation", self._blocks("validation", tokenizer, reading), end)
            yield from _closed("train", self._blocks("train", tokenizer, reading), end)
            return
        kept = self._kept(tokenizer)
        yield from _closed("train", _until(kept, self._blocks("train", tokenizer, reading)), end)
        yield from _closed("validation", self._blocks("train", tokenizer, reading, kept), end)

    @cached_property
    def _files(self) -> dict[TextSplit, list[TokenFile]]:
        splits: tuple[TextSplit, ...] = ("train", "validation")
        return {split: [TokenFile.of(path) for path in self.files_of(split)] for split in splits}

    def _kept(self, tokenizer: Tokenizer) -> int:
        """Return how many tokens are trained on where some are held out: up to the end of a document if there is one.

        Raises:
          UserError: there are fewer than two.
        """
        total = sum(file.tokens for file in self._files["train"])
        if total < 2:
            raise UserError(f"Corpus '{self}' has {total} tokens; it needs more to train on and to validate with.")
        start = place = total - max(total // HELD_OUT_SHARE, 1)
        for block in self._blocks("train", tokenizer, Reading(), start - 1):
            for end in np.flatnonzero(block == tokenizer.end_of_text) + place:
                if end < total:
                    return int(end)
            place += len(block)
        return start

    def _blocks(self, split: TextSplit, tokenizer: Tokenizer, reading: Reading, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the tokens of a split's files from a place on, all of which the tokenizer has."""
        for file in self._files[split]:
            skipped = min(start, file.tokens)
            start, place = start - skipped, skipped
            for block in file.blocks(skipped) if skipped < file.tokens else ():
                _check_ids(block, file, place, tokenizer)
                place += len(block)
                reading.position += block.nbytes
                yield block


def _check_ids(block: np.ndarray, file: TokenFile, place: int, tokenizer: Tokenizer) -> None:
    if block.max() >= tokenizer.vocab_size:
        at = int(np.argmax(block >= tokenizer.vocab_size))
        raise UserError(
            f"Corpus file '{file.path}' has id {block[at]} as its token {place + at}; the tokenizer's ids are below"
            f" {tokenizer.vocab_size}."
        )


def _until(stop: int, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the first tokens of blocks."""
    for block in blocks:
        yield block[:stop]
        stop -= len(block)
        if stop <= 0:
            return


def _closed(split: TextSplit, blocks: Iterator[np.ndarray], end: int) -> Iterator[tuple[TextSplit, np.ndarray]]:
    """Yield blocks with their split, and the end of a document where the last has none."""
    last = np.array([end])
    for last in blocks:
        yield split, last
    if last[-1] != end:
        yield split, np.array([end], last.dtype)

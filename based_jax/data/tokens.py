"""The tokens of a split on disk: one stream in a file, documents one after the other, each closed by end-of-text.

Windows of any length are read from it where they are asked for; neighbours share one token, so every token is a target
once, and which document a token is of follows from the end-of-text tokens:

    stream       t h e   e n d <eot> a n d <eot>      windows of 4: "the e", "end<eot>a", "and<eot>" and padding
"""

import hashlib
import operator
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from based_jax.errors import UserError
from based_jax.folders import check_file, reason

TOKENS_PER_CHECKSUM = 2**18


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest of the types that tokens are kept in."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class TokenWriter:
    """Appends documents to a file of tokens, and knows at the end what `TokenStream` checks them by."""

    def __init__(self, file: BinaryIO, dtype: np.dtype, end_of_text: int):
        self._file, self._dtype, self._end = file, dtype, end_of_text
        self.tokens = self.documents = 0

    def write(self, ids: np.ndarray) -> None:
        """Append ids, each document's end among them."""
        self._file.write(ids.astype(self._dtype, copy=False).tobytes())
        self.tokens += len(ids)
        self.documents += int(np.count_nonzero(ids == self._end))


def facts(path: Path, writer: TokenWriter, dtype: np.dtype) -> dict[str, Any]:
    """Return what `TokenStream` has to know of a file that was written, as JSON."""
    digest, checksums = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(TOKENS_PER_CHECKSUM * dtype.itemsize):
            digest.update(block)
            checksums.append(zlib.crc32(block))
    return {
        "tokens": writer.tokens,
        "documents": writer.documents,
        "sha256": digest.hexdigest(),
        "checksums": checksums,
    }


def checked_facts(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `facts` said, read again; ValueError, TypeError or KeyError where it is damaged."""
    tokens, documents = operator.index(known["tokens"]), operator.index(known["documents"])
    checksums = [operator.index(checksum) for checksum in known["checksums"]]
    if len(checksums) != -(-tokens // TOKENS_PER_CHECKSUM):
        raise ValueError(f"{len(checksums)} checksums of {tokens} tokens")
    return {"tokens": tokens, "documents": documents, "sha256": str(known["sha256"]), "checksums": checksums}


class TokenStream:
    """Tokens of a file, any slice of them; what is read is compared with its checksum at first use.

    Raises:
      UserError: the file is missing, or has another length than it was written with.
    """

    def __init__(self, path: Path, dtype: np.dtype, tokens: int, checksums: list[int]):
        self._path, self._dtype, self._tokens, self._checksums = path, dtype, tokens, checksums
        self._good = np.zeros(len(checksums), bool)
        try:
            check_file(path)
            self._file = path.open("rb", buffering=0)
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise damaged(path.parent, f"{path.name}: {reason(error)}") from None
        if size != tokens * dtype.itemsize:
            raise self._other_length

    def __len__(self) -> int:
        return self._tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens of [start, stop), fewer at the end; UserError where they are not as written."""
        stop = min(stop, len(self))
        for block in range(start // TOKENS_PER_CHECKSUM, -(-stop // TOKENS_PER_CHECKSUM)):
            if not self._good[block]:
                self._check(block)
        return self._slice(start, stop)

    def _check(self, block: int) -> None:
        first = block * TOKENS_PER_CHECKSUM
        found = self._slice(first, min(first + TOKENS_PER_CHECKSUM, len(self)))
        if zlib.crc32(found) != self._checksums[block]:
            which = f"block {block} of {len(self._checksums)} of {self._path.name}"
            raise damaged(self._path.parent, f"{which} does not have its checksum")
        self._good[block] = True

    def _slice(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens of [start, stop) as they lie there: a disk that fails is an error here, and no signal."""
        size = self._dtype.itemsize
        try:
            found = os.pread(self._file.fileno(), (stop - start) * size, start * size)
        except OSError as error:
            raise damaged(self._path.parent, f"{self._path.name}: {reason(error)}") from None
        if len(found) != (stop - start) * size:
            raise self._other_length
        return np.frombuffer(found, self._dtype)

    @property
    def _other_length(self) -> UserError:
        return damaged(self._path.parent, f"{self._path.name} has another length than it was written with")


class Windows:
    """The windows of a stream: {"tokens", "segment_ids"} of shape (seq_len + 1,), int32, id 0 for the last's padding.

    They stand in the order of the md5 of their number behind `name`, in which tensorflow-datasets kept them: runs that
    began with it continue.
    """

    def __init__(self, stream: TokenStream, end_of_text: int, seq_len: int, name: str):
        self._stream, self._end, self._seq_len = stream, end_of_text, seq_len
        self._order = hashed_order(max(-(-(len(stream) - 1) // seq_len), 1), name)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(self._order[index]) * self._seq_len
        return window(self._stream.read(start, start + self._seq_len + 1), self._end, self._seq_len)


def window(tokens: np.ndarray, end_of_text: int, seq_len: int) -> dict[str, np.ndarray]:
    """Return a window of at most seq_len + 1 tokens: padded, and its documents numbered from 1."""
    padded, ids = np.zeros((2, seq_len + 1), np.int32)
    padded[: len(tokens)] = tokens
    ids[: len(tokens)] = 1
    ids[1 : len(tokens)] += np.cumsum(tokens[:-1] == end_of_text, dtype=np.int32)
    return {"tokens": padded, "segment_ids": ids}


def hashed_order(count: int, name: str) -> np.ndarray:
    """Return the numbers below `count` by the md5 of `name` and their digits."""
    salted = hashlib.md5(name.encode(), usedforsecurity=False)
    digests = bytearray()
    for number in range(count):
        digest = salted.copy()
        digest.update(b"%d" % number)
        digests += digest.digest()
    high, low = np.frombuffer(digests, ">u8").reshape(count, 2).T
    return np.lexsort((low, high))


def damaged(folder: Path, why: str) -> UserError:
    """Return the error for packed text that cannot be read."""
    return UserError(
        f"Packed text '{folder}' is damaged ({why}); remove it if data.path is its corpus, which is packed"
        " again then, or else copy it again."
    )

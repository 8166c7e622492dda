"""Tokens of one file that was tokenised elsewhere, in blocks: .npy, or the raw .bin of nanoGPT and Megatron.

    train.bin, train.uint16.bin    uint16, little-endian, nothing before them and nothing behind
    train.uint32.bin               the same of uint32
    train.npy                      one axis of either type, as it says itself

Megatron's .idx is not needed, and not read.
"""

import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from based_jax.errors import UserError

TOKENS_AT_ONCE = 2**20
TOKENS_THAT_TELL_THE_TYPE = 64
DTYPES = (np.dtype("<u2"), np.dtype("<u4"))
DTYPES_BY_SUFFIX: dict[str, np.dtype | None] = {
    ".npy": None,
    ".uint16.bin": np.dtype("<u2"),
    ".uint32.bin": np.dtype("<u4"),
    ".bin": np.dtype("<u2"),
}
TOKEN_SUFFIXES = tuple(DTYPES_BY_SUFFIX)


class TokenFile(NamedTuple):
    """Where the tokens of a file begin, in bytes, how many there are, and of which type."""

    path: Path
    dtype: np.dtype
    offset: int
    tokens: int

    @classmethod
    def of(cls, path: Path) -> "TokenFile":
        """Return what a file holds, without reading its tokens.

        Raises:
          UserError: it cannot be read, is cut short, or is of another type or shape.
        """
        try:
            with path.open("rb") as file:
                found = _of_npy(path, file) if path.name.lower().endswith(".npy") else _of_raw(path)
                _check_size(found)
                _check_is_no_wider(found, file)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None
        except tokenize.TokenError:  # of the line that says shape and type
            raise _unreadable(path, ValueError("its header is damaged")) from None
        return found

    def blocks(self, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the tokens from a place on, at most `TOKENS_AT_ONCE` at a time; raises as `of`."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                while len(block := np.fromfile(file, self.dtype, min(TOKENS_AT_ONCE, self.tokens - start))):
                    yield block
                    start += len(block)
        except OSError as error:
            raise _unreadable(self.path, error) from None


def _of_npy(path: Path, file: BinaryIO) -> TokenFile:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if len(shape) != 1 or dtype not in DTYPES:
        axes = f"{len(shape)} {'axis' if len(shape) == 1 else 'axes'}"
        raise UserError(f"Corpus file '{path}' has {axes} of {dtype}; tokens are one axis of uint16 or uint32.")
    return TokenFile(path, dtype, file.tell(), shape[0])


def _of_raw(path: Path) -> TokenFile:
    dtype = next(found for suffix, found in DTYPES_BY_SUFFIX.items() if found and path.name.lower().endswith(suffix))
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise UserError(f"Corpus file '{path}' has {size} bytes, which are no whole number of {dtype} tokens.")
    return TokenFile(path, dtype, 0, size // dtype.itemsize)


def _check_size(found: TokenFile) -> None:
    there = (found.path.stat().st_size - found.offset) // found.dtype.itemsize
    if there != found.tokens:
        raise UserError(f"Corpus file '{found.path}' says that it has {found.tokens} tokens, but has {there}.")


def _check_is_no_wider(found: TokenFile, file: BinaryIO) -> None:
    """Refuse tokens of 32 bits that are named as if they had 16: every other one is 0."""
    if found.dtype == DTYPES[0] and found.offset == 0 and found.tokens >= TOKENS_THAT_TELL_THE_TYPE:
        first = np.fromfile(file, found.dtype, TOKENS_THAT_TELL_THE_TYPE)
        if not first[1::2].any():
            raise UserError(
                f"Corpus file '{found.path}' has a 0 as every other uint16, as tokens of uint32 do;"
                " such a file's name ends in .uint32.bin."
            )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"Corpus file '{path}' cannot be read: {reason.partition(chr(10))[0].rstrip('.')[:150]}.")

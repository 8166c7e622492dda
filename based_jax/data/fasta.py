"""DNA as ids: the records of FASTA files, in which A, C, G, T and N (a base that was not read) are 0 to 4.

Lower case, which marks repeats, is read as upper case, and IUPAC's letters for one of several bases as N.
"""

import lzma
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from based_jax.data.checks import check_bools, check_ints, check_seed
from based_jax.data.documents import DECOMPRESSION_BY_SUFFIX, suffix_of
from based_jax.errors import UserError
from based_jax.folders import local_path

LETTERS = "ACGTN"
NOT_READ = LETTERS.index("N")
ONE_OF_SEVERAL = "RYSWKMBDHV"
COMPLEMENTS = np.asarray([3, 2, 1, 0, NOT_READ], np.uint8)
FASTA_SUFFIXES = tuple(f"{name}{packed}" for name in (".fa", ".fasta", ".fna") for packed in DECOMPRESSION_BY_SUFFIX)
_SPACE, _UNKNOWN = 254, 255


class Record(NamedTuple):
    """A sequence: the name behind its ">", and its ids, uint8."""

    name: str
    ids: np.ndarray


def _id_by_byte() -> np.ndarray:
    table = np.full(256, _UNKNOWN, np.uint8)
    for letters, i in [*((letter, i) for i, letter in enumerate(LETTERS)), (ONE_OF_SEVERAL, NOT_READ)]:
        for letter in letters + letters.lower():
            table[ord(letter)] = i
    table[[ord(space) for space in " \t\r\n"]] = _SPACE
    return table


ID_BY_BYTE = _id_by_byte()


def default_sequences() -> Path:
    """Return the folder of the shipped genome of E. coli and slice of human chromosome 22 (see its SOURCE.md)."""
    return Path(__file__).parent / "assets" / "dna"


def fasta_files(path: str | os.PathLike) -> list[Path]:
    """Return a file, or those of a folder that end in `FASTA_SUFFIXES`, by name.

    Raises:
      UserError: there is none.
    """
    place = local_path(path, "path")
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if suffix_of(file, FASTA_SUFFIXES))
        if not files:
            raise UserError(f"Folder '{place}' has no file that ends in {', '.join(FASTA_SUFFIXES)}.")
        if len({stem(file) for file in files}) < len(files):
            raise UserError(f"Folder '{place}' has two files of one name but for their endings; rename one.")
        return files
    if not place.is_file():
        raise UserError(f"path is '{place}', which does not exist; it is a FASTA file or a folder of them.")
    return [place]


def stem(file: Path) -> str:
    """Return a file's name without what says that it is FASTA, and packed."""
    return file.name[: len(file.name) - len(suffix_of(file, FASTA_SUFFIXES) or "")]


def read_fasta(file: Path) -> list[Record]:
    """Return the records of a file, read whole.

    Raises:
      UserError: the file cannot be read, is no FASTA, or has a letter that stands for no base.
    """
    packed = next((end for end in DECOMPRESSION_BY_SUFFIX if end and file.name.lower().endswith(end)), "")
    try:
        with file.open("rb") as raw, DECOMPRESSION_BY_SUFFIX[packed](raw) as unpacked:
            text = unpacked.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"FASTA file '{file}' cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    before, *records = (b"\n" + text).split(b"\n>")
    if before.strip() or not records:
        found = before.strip()[:20].decode(errors="replace")
        raise UserError(f"FASTA file '{file}' begins with '{found}'; it begins with '>' and the name of a record.")
    return [_record(file, record) for record in records]


def _record(file: Path, text: bytes) -> Record:
    header, _, letters = text.partition(b"\n")
    name = header.decode(errors="replace").strip()
    ids = ID_BY_BYTE[np.frombuffer(letters, np.uint8)]
    if (unknown := ids == _UNKNOWN).any():
        letter = chr(letters[int(np.argmax(unknown))])
        raise UserError(
            f"FASTA file '{file}' has {letter!r} in the record '{name:.40}'; letters are {LETTERS}{ONE_OF_SEVERAL}."
        )
    return Record(name, ids[ids != _SPACE])


def check_dna(
    path: str | os.PathLike | None, seq_len: int, test_lengths: tuple[int, ...], reverse_complement: bool, seed: int
) -> None:
    """Check what can be known of a task on DNA before its files are read.

    Raises:
      UserError: a path names nothing, a length is not at least 1 or is given twice, or a seed is impossible.
    """
    if path is not None:
        local_path(path, "path")
    check_ints(seq_len=seq_len, **{f"test_lengths[{i}]": length for i, length in enumerate(test_lengths)})
    for name, length in [("seq_len", seq_len), *(("test_lengths", length) for length in test_lengths)]:
        if length < 1:
            raise UserError(f"{name} is {length}; it is at least 1.")
    if len(set(test_lengths)) < len(test_lengths):
        raise UserError(f"test_lengths are {list(test_lengths)}; they differ.")
    check_bools(reverse_complement=reverse_complement)
    check_seed(seed)

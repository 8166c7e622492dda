"""Documents of one file, in chunks: .txt (one document), .jsonl (one a line) or .parquet (one a row).

In the last two it stands under "text", or where a corpus' `text_feature` says. A chunk is a part of a document, as much
as is held in memory at once. Blank documents are left out and counted; a lone surrogate, which JSON can spell but UTF-8
cannot, becomes U+FFFD and is counted; a byte order mark is no text.
"""

import codecs
import dataclasses
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from based_jax.errors import UserError

CHUNK_CHARACTERS = 2**20
ROWS_AT_ONCE = 256
BYTES_OF_PARQUET_AT_ONCE = 2**20
BYTE_ORDER_MARK = "\ufeff"
PARQUET = ".parquet"
TEXT_FEATURE = "text"


class Chunk(NamedTuple):
    """A part of a document's text, and whether it is the document's last."""

    text: str
    last: bool


@dataclasses.dataclass
class Reading:
    """What a pass over a corpus has met so far.

    Attributes:
      position: how much of the corpus' `extent` is read.
      blank: documents that were left out, being empty, null or nothing but white space.
      mended: documents in which a lone surrogate became U+FFFD.
    """

    position: int = 0
    blank: int = 0
    mended: int = 0

    def document(self, text: str | None) -> Iterator[Chunk]:
        """Yield a document that is read whole, unless it is blank."""
        if not text or not text.strip():
            self.blank += 1
            return
        if not _is_utf8(text):
            self.mended += 1
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield Chunk(text, last=True)


def read_documents(path: Path, reading: Reading, feature: str = TEXT_FEATURE) -> Iterator[Chunk]:
    """Yield the documents of a file; `feature` names the key of a line, or the column, that holds one.

    Raises:
      UserError: the file cannot be read, is damaged or not UTF-8, or a line or a row of it is no document.
    """
    start, (decompress, read) = reading.position, _reader(path)
    try:
        with path.open("rb") as raw:
            for chunk in read(decompress(raw), path, reading, feature):
                yield chunk
                reading.position = start + raw.tell()
    except UnicodeDecodeError as error:
        where = _first_bad_byte(path, decompress, feature)
        raise UserError(f"Corpus file '{path}' is not UTF-8 text: {error.reason} at {where}.") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"Corpus file '{path}' cannot be read: {_reason(error)}.") from None
    reading.position = start + path.stat().st_size


def _unpacked_zstd(raw: BinaryIO) -> BinaryIO:
    import pyarrow  # comes with tensorflow-datasets; its import takes longer than most corpora need it for

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


def _text(file: BinaryIO, path: Path, reading: Reading, feature: str) -> Iterator[Chunk]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    chunk = text.read(CHUNK_CHARACTERS)
    while not chunk.strip():
        if not (more := text.read(CHUNK_CHARACTERS)):
            reading.blank += 1
            return
        chunk += more
    while chunk:
        following = text.read(CHUNK_CHARACTERS)
        yield Chunk(chunk, last=not following)
        chunk = following


def _json_lines(file: BinaryIO, path: Path, reading: Reading, feature: str) -> Iterator[Chunk]:
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8"), start=1):
        if json_text := line.lstrip(BYTE_ORDER_MARK).strip():
            yield from reading.document(_text_of(json_text, path, number, feature))


def _text_of(line: str, path: Path, number: int, feature: str) -> str | None:
    try:
        text = json.loads(line)[feature]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = 0
    if text is not None and not isinstance(text, str):
        raise UserError(f"Corpus file '{path}', line {number}, is no JSON object with a \"{feature}\": {line[:40]!r}.")
    return text


def _parquet_rows(file: BinaryIO, path: Path, reading: Reading, feature: str) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=BYTES_OF_PARQUET_AT_ONCE, pre_buffer=False)
        _check_text_column(table.schema_arrow, path, feature)
        for rows in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[feature]):
            for text in rows.column(0).cast(pyarrow.large_string()).to_pylist():
                yield from reading.document(text)
    except pyarrow.ArrowException as error:
        raise UserError(f"Corpus file '{path}' cannot be read: {_reason(error)}.") from None


def _check_text_column(schema: Any, path: Path, feature: str) -> None:
    import pyarrow

    if feature not in schema.names:
        there = ", ".join(schema.names) or "none"
        raise UserError(f"Corpus file '{path}' has no column '{feature}'; it has {there}.")
    if schema.names.count(feature) > 1:
        raise UserError(f"Corpus file '{path}' has {schema.names.count(feature)} columns '{feature}'; it has one.")
    kind = schema.field(feature).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if values not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise UserError(f"Corpus file '{path}' has a column '{feature}' of {kind}; it is string.")


DECOMPRESSION_BY_SUFFIX: dict[str, Callable[[Any], Any]] = {
    "": lambda raw: raw,
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": _unpacked_zstd,
}
READERS_BY_SUFFIX: dict[str, Callable[[BinaryIO, Path, Reading, str], Iterator[Chunk]]] = {
    **{f".txt{packed}": _text for packed in DECOMPRESSION_BY_SUFFIX},
    **{f".jsonl{packed}": _json_lines for packed in DECOMPRESSION_BY_SUFFIX},
    PARQUET: _parquet_rows,
}
TEXT_SUFFIXES = tuple(READERS_BY_SUFFIX)
SUFFIXES_WITH_FEATURES = tuple(suffix for suffix in TEXT_SUFFIXES if not suffix.startswith(".txt"))


def suffix_of(path: Path, suffixes: Iterable[str]) -> str | None:
    """Return the first of some suffixes that a file's name ends in, in upper or lower case."""
    return next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)


def _reader(path: Path) -> tuple[Callable, Callable]:
    """Return what decompresses a file, and what reads its documents."""
    suffix = suffix_of(path, TEXT_SUFFIXES)
    assert suffix is not None, path
    packed = "." + suffix.split(".")[-1]
    return DECOMPRESSION_BY_SUFFIX.get(packed, DECOMPRESSION_BY_SUFFIX[""]), READERS_BY_SUFFIX[suffix]


def _first_bad_byte(path: Path, decompress: Callable, feature: str) -> str:
    """Return where a file stops being UTF-8, in words; the error itself counts from some buffer's beginning."""
    if suffix_of(path, TEXT_SUFFIXES) == PARQUET:
        return f"a row of its column '{feature}'"
    decoder, read, lines = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with path.open("rb") as raw, decompress(raw) as file:
        while block := file.read(CHUNK_CHARACTERS):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                bad = error.start - pending
                return f"byte {read + bad}, line {lines + block[: max(bad, 0)].count(b'\n')}"
            read, lines = read + len(block), lines + block.count(b"\n")
    return "its last byte"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: Exception) -> str:
    """Return an error's reason as the end of a sentence."""
    reason = getattr(error, "strerror", None) or str(error)
    return reason.partition("\n")[0].rstrip(".")[:150]

"""Rows of a set of examples: a file, a folder, or a set of the Hugging Face hub, which is fetched as a folder."""

import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from based_jax.data.documents import DECOMPRESSION_BY_SUFFIX, PARQUET, suffix_of
from based_jax.errors import UserError
from based_jax.folders import check_file, local_path, reason

HUB_PREFIX = "hub:"
SAMPLES = Path(__file__).parent / "samples"
JSON_LINES = tuple(f".jsonl{packed}" for packed in DECOMPRESSION_BY_SUFFIX)
ROW_SUFFIXES = (*JSON_LINES, PARQUET)
SPLIT = "validation"
Row = dict[str, Any]


def sample(name: str) -> str:
    """Return the source of the rows that come with the package (`samples/SOURCE.md`)."""
    return str(SAMPLES / f"{name}.jsonl.xz")


def read_rows(source: str) -> list[Row]:
    """Return the rows of 'hub:OWNER/NAME', or of a file or a folder of .jsonl (.gz, .xz, .zst) or .parquet.

    Of a folder whose files name splits those of validation are read.

    Raises:
      UserError: there is none, the hub cannot be reached, or a file cannot be read or is damaged.
    """
    path = _fetched(source.removeprefix(HUB_PREFIX)) if source.startswith(HUB_PREFIX) else local_path(source, "data")
    rows = [row for file in _files(path) for row in _rows_of(file)]
    if not rows:
        raise UserError(f"'{source}' has no rows.")
    return rows


def _fetched(name: str) -> Path:
    """Return the folder of a set of the hub, as the hub's own cache keeps it."""
    import huggingface_hub  # slow to import; comes with tokenizers

    patterns = [f"*{suffix}" for suffix in ROW_SUFFIXES]
    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # of the hub, of HTTP, of the file system
        raise UserError(
            f"The set '{name}' cannot be fetched from the hub ({type(error).__name__}); "
            "give the task a file of its rows by --data=TASK=FILE."
        ) from None


def _files(path: Path) -> list[Path]:
    """Return the files of rows that a path names: itself, or those below a folder."""
    try:
        check_file(path)
        found = sorted(x for x in path.rglob("*") if suffix_of(x, ROW_SUFFIXES)) if path.is_dir() else [path]
    except OSError as error:
        raise UserError(f"Data '{path}' cannot be read: {reason(error)}.") from None
    if not found or suffix_of(found[0], ROW_SUFFIXES) is None:
        raise UserError(f"Data '{path}' has no file of rows; their names end in {', '.join(ROW_SUFFIXES)}.")
    return [x for x in found if SPLIT in x.name] or found


def _rows_of(file: Path) -> Iterator[Row]:
    read = _parquet_rows if suffix_of(file, (PARQUET,)) else _json_rows
    try:
        yield from read(file)
    except UnicodeDecodeError as error:
        raise UserError(f"Data file '{file}' is not UTF-8 text: {error.reason}.") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"Data file '{file}' cannot be read: {reason(error)}.") from None


def _json_rows(file: Path) -> Iterator[Row]:
    suffix = suffix_of(file, JSON_LINES) or ""
    decompress = DECOMPRESSION_BY_SUFFIX[suffix.removeprefix(".jsonl")]
    with file.open("rb") as raw, decompress(raw) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row_of(line.decode(), number, file)


def _row_of(line: str, number: int, file: Path) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(f"Line {number} of data file '{file}' is no JSON object: {line[:40]!r}.")
    return row


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"Data file '{file}' cannot be read: {reason(error)}.") from None

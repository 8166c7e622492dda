"""How fast a corpus is packed, in how much memory, and how fast what is packed is read; corpora are made up for it."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from based_jax.data.text import TextSource
from based_jax.data.tokenizer import ByteTokenizer
from based_jax.errors import UserError, unknown
from based_jax.folders import make_folder, writing

MEAN_LETTERS = 1000
"""Of a document; lengths are exponential, as unequal as those of the web's pages."""
LETTERS_DRAWN = 2**24
TOKENS_A_FILE = 2**27
DOCUMENTS_AT_ONCE = 1000
SEQ_LEN, BATCH_SIZE = 2048, 64
BATCHES_READ = 200


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is packed: about so many tokens of the tokenizer of bytes, in files of one kind, by so many processes.

    Raises:
      UserError: the kind is unknown, or a number below 1.
    """

    kind: str
    tokens: int
    processes: int

    def __post_init__(self):
        if self.kind not in WRITERS:
            raise unknown("kind", self.kind, WRITERS)
        for name in ("tokens", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is at least 1.")


def measure(corpus: Corpus, folder: Path | None) -> dict[str, Any]:
    """Return the row of a corpus: what was packed and read in a process of its own, with its time and memory.

    Args:
      corpus: see there.
      folder: where corpus and packed text are written, about 4 bytes a token; they are removed. None for a temporary
        one.

    Raises:
      UserError: the folder cannot be written.
    """
    if folder is not None:
        make_folder(folder)
    with tempfile.TemporaryDirectory(prefix="data_", dir=folder) as name, writing(name):
        place = Path(name) / "corpus"
        place.mkdir()
        write(corpus, place)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(_packed_and_read, corpus, place, Path(name) / "cache").result()


def write(corpus: Corpus, folder: Path) -> None:
    """Write the files of a corpus; the same ones for equal corpora."""
    documents = _documents(corpus.tokens)
    for number in itertools.count():
        if (first := next(documents, None)) is None:
            return
        part = itertools.chain([first], _up_to(TOKENS_A_FILE, documents))
        WRITERS[corpus.kind](folder / f"{number:05}.{corpus.kind}", part)


def _packed_and_read(corpus: Corpus, folder: Path, cache: Path) -> dict[str, Any]:
    def opened() -> TextSource:
        return TextSource(folder, "bytes", SEQ_LEN, BATCH_SIZE, cache_dir=cache, processes=corpus.processes)

    with _timed() as packing:
        opened()
    peak = _peak_bytes(corpus.processes)
    with _timed() as opening:
        source = opened()
    with _timed() as reading:
        read = sum(source.batch(step)["inputs"].size for step in range(BATCHES_READ))
    tokens = json.loads((source.folders[0] / "index.json").read_text())["splits"]
    packed = sum(split["tokens"] for split in tokens.values())
    sizes = {"corpus_bytes": sum(path.stat().st_size for path in folder.iterdir()), "tokens": packed}
    return (
        {"kind": corpus.kind, "processes": corpus.processes}
        | sizes
        | {f"pack_{name}": value for name, value in packing.items()}
        | {"pack_peak_bytes": peak, "pack_tokens_per_second": round(packed / packing["seconds"])}
        | {"open_seconds": opening["seconds"], "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN}
        | {"read_tokens_per_second": round(read / reading["seconds"])}
    )


@contextlib.contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Return a dict that holds seconds, and CPU seconds of this process and of those that it began and that ended."""
    found: dict[str, float] = {}
    begin, cpu = time.perf_counter(), _cpu_seconds()
    yield found
    found["seconds"] = round(time.perf_counter() - begin, 3)
    found["cpu_seconds"] = round(_cpu_seconds() - cpu, 3)


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_bytes(processes: int) -> int:
    """Return the most that this process has held, and as much for each that encoded as the largest of them did."""
    own, other = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * (own + other * (processes if processes > 1 else 0))


def _documents(tokens: int) -> Iterator[bytes]:
    """Yield documents of lower-case words, with about so many letters and ends of text in all."""
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, LETTERS_DRAWN, np.uint8)
    letters[rng.integers(LETTERS_DRAWN, size=LETTERS_DRAWN // 6)] = ord(" ")
    text = letters.tobytes()
    while tokens > 0:
        sizes = 1 + rng.exponential(MEAN_LETTERS, DOCUMENTS_AT_ONCE).astype(int)
        for size, at in zip(sizes, rng.integers(LETTERS_DRAWN // 2, size=DOCUMENTS_AT_ONCE), strict=True):
            yield text[at : at + size]
            tokens -= int(size) + 1
            if tokens <= 0:
                return


def _up_to(tokens: int, documents: Iterator[bytes]) -> Iterator[bytes]:
    """Yield documents until there are so many tokens of them."""
    for document in documents:
        yield document
        tokens -= len(document) + 1
        if tokens <= 0:
            return


def _write_bin(path: Path, documents: Iterable[bytes]) -> None:
    end = np.array([ByteTokenizer.end_of_text], "<u2")
    with path.open("wb") as file:
        for document in documents:
            file.write(np.frombuffer(document, np.uint8).astype("<u2").tobytes())
            file.write(end.tobytes())


def _write_jsonl(path: Path, documents: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(map(_json_line, documents))


def _write_jsonl_zst(path: Path, documents: Iterable[bytes]) -> None:
    with pyarrow.CompressedOutputStream(path, "zstd") as file:
        for some in itertools.batched(documents, DOCUMENTS_AT_ONCE):
            file.write(b"".join(map(_json_line, some)))


def _write_parquet(path: Path, documents: Iterable[bytes]) -> None:
    schema = pyarrow.schema({"text": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as file:
        for some in itertools.batched(documents, DOCUMENTS_AT_ONCE):
            file.write(pyarrow.table({"text": [document.decode() for document in some]}, schema))


def _json_line(document: bytes) -> bytes:
    return b'{"text": "' + document + b'"}\n'


WRITERS: dict[str, Callable[[Path, Iterable[bytes]], None]] = {
    "bin": _write_bin,
    "jsonl": _write_jsonl,
    "jsonl.zst": _write_jsonl_zst,
    "parquet": _write_parquet,
}


def line(row: dict[str, Any]) -> str:
    """Return a row in one line of print."""
    packed = f"{row['tokens']:,} tokens of .{row['kind']} packed by {row['processes']} in {row['pack_seconds']:.1f} s"
    speed = f"{row['pack_tokens_per_second']:,} tokens/s, {row['pack_peak_bytes'] / 2**20:.0f} MiB at most"
    read = f"opened in {row['open_seconds']:.2f} s, read at {row['read_tokens_per_second']:,} tokens/s"
    return f"{packed} ({speed}); {read}"

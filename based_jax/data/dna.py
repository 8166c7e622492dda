"""DNA, base by base: training reads either strand at random places, evaluation all held-out bases at each length.

The last tenth of every record, by position, is held out. A row is a window of seq_len + 1 bases, cut where 100 or more
bases in a row were not read (a gap of the assembly has no known length):

    bases        G A T T A C A N      inputs  = bases[:-1]
    labels       A T T A C A .        labels  = bases[1:], NO_LABEL where a base was not read
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from based_jax.data.corpus import combined_hash, hash_file
from based_jax.data.fasta import (
    COMPLEMENTS,
    NOT_READ,
    Record,
    check_dna,
    default_sequences,
    fasta_files,
    read_fasta,
    stem,
)
from based_jax.data.hosts import Rows, own_rows
from based_jax.data.segments import Batch
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL

HELD_OUT_SHARE = 10
"""One base in so many is held out."""
SHORTEST_GAP = 100


class Windows:
    """Windows of `length` + 1 bases, neighbours of which share one: every base but a stretch's first is a target once.

    Args:
      stretches: bases without a gap, uint8.
      length: targets of a window; what a stretch has too few of is filled up with bases that were not read.
    """

    def __init__(self, stretches: Sequence[np.ndarray], length: int):
        self._stretches, self._length = [ids for ids in stretches if len(ids) > 1], length
        self._counts = [-(-(len(ids) - 1) // length) for ids in self._stretches]
        self._ends = np.cumsum([0, *self._counts])

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """Return window i, in the order of positions."""
        stretch, place = self._find(i)
        return self._cut(stretch, place * self._length)

    def drawn(self, i: int, rng: np.random.Generator) -> np.ndarray:
        """Return a window that begins anywhere in the i-th of equal parts of what a window can begin at."""
        stretch, place = self._find(i)
        begins = max(len(self._stretches[stretch]) - self._length, 1)
        return self._cut(stretch, min(int((place + rng.random()) * begins / self._counts[stretch]), begins - 1))

    def _find(self, i: int) -> tuple[int, int]:
        """Return the stretch of window i, and which of its windows that is."""
        stretch = int(np.searchsorted(self._ends, i, side="right")) - 1
        return stretch, i - int(self._ends[stretch])

    def _cut(self, stretch: int, start: int) -> np.ndarray:
        ids = self._stretches[stretch][start : start + self._length + 1]
        return np.pad(ids, (0, self._length + 1 - len(ids)), constant_values=NOT_READ)


class DnaSource:
    """Batches of windows of DNA: {"inputs", "labels"} of shape (rows, length), int32.

    Batch t is a pure function of (files, arguments, t): row i of training is a window of an epoch's shuffled parts,
    whose place in its part and whose strand are drawn by (seed, i).

    Args:
      path: a FASTA file or a folder of them; the shipped sequences if None.
      seq_len: bases of a training row.
      batch_size: rows of all hosts.
      test_lengths: bases of the rows of evaluations, one of each; (seq_len,) where there is none.
      reverse_complement: whether half of the training rows are of the other strand.
      seed: of the places and strands.
      rows: places in every batch that this host feeds, all if None.

    Raises:
      UserError: a file is no FASTA, or there are too few bases to train on or to evaluate.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        seq_len: int,
        batch_size: int,
        *,
        test_lengths: tuple[int, ...] = (),
        reverse_complement: bool = True,
        seed: int = 0,
        rows: Rows | None = None,
    ):
        check_dna(path, seq_len, test_lengths, reverse_complement, seed)
        self._batch_size, self._own = batch_size, own_rows(batch_size, rows)
        self._files = fasta_files(default_sequences() if path is None else path)
        self._records = {stem(file): read_fasta(file) for file in self._files}
        self._lengths = test_lengths or (seq_len,)
        windows = Windows(self.kept, seq_len)
        if not len(windows) or not all(map(self.held_out, self.names)):
            shown = ", ".join(map(str, self._files))
            raise UserError(f"There are too few bases in {shown}: a record is of {2 * HELD_OUT_SHARE} and more.")

        def row(i: int, rng: np.random.Generator) -> np.ndarray:
            bases = windows.drawn(i, rng)
            return COMPLEMENTS[bases[::-1]] if reverse_complement and rng.integers(2) else bases

        self._train = grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat().random_map(row)

    @property
    def names(self) -> tuple[str, ...]:
        """The files, without their endings."""
        return tuple(self._records)

    @property
    def kept(self) -> list[np.ndarray]:
        """The stretches that are trained on, ids: of each record the first nine tenths, cut at gaps."""
        return [part for records in self._records.values() for part in _kept(records)]

    def held_out(self, name: str) -> list[np.ndarray]:
        """Return the stretches of a file that are evaluated: of each record the last tenth, cut at gaps."""
        return [part for x in self._records[name] for part in _stretches(x.ids[_boundary(x) :])]

    def batch(self, step: int) -> Batch:
        """Return this host's rows of training batch `step`, counted from 0 through all epochs."""
        return _batch([self._train[int(row)] for row in step * self._batch_size + self._own])

    @property
    def eval_names(self) -> tuple[str, ...]:
        """File and length, such as "ecoli_536@8192"."""
        return tuple(f"{name}@{length}" for name in self.names for length in self._lengths)

    def eval_batches(self, name: str) -> Iterator[Batch]:
        """Yield this host's rows of a file's held-out windows, once, the last batch filled up with unlabelled rows."""
        file, _, length = name.rpartition("@")
        windows = Windows(self.held_out(file), int(length))
        empty = np.full(int(length) + 1, NOT_READ, np.uint8)
        for start in range(0, len(windows), self._batch_size):
            places = (int(place) for place in start + self._own)
            yield _batch([windows[i] if i < len(windows) else empty for i in places])

    @property
    def record(self) -> dict[str, Any]:
        """The files that the batches depend on beside the config."""
        hashes = {file.name: hash_file(file) for file in self._files}
        return {"fingerprint": combined_hash(hashes), "path": str(self._files[0].parent.absolute()), "files": hashes}

    @property
    def summary(self) -> tuple[str, ...]:
        """The bases of both splits by file, a line each."""
        return tuple(
            f"{name}: {_known(_kept(records)):,} bases to train on, {_known(self.held_out(name)):,} held out"
            for name, records in self._records.items()
        )


def _kept(records: Sequence[Record]) -> list[np.ndarray]:
    """Return the stretches of the records' first nine tenths."""
    return [part for record in records for part in _stretches(record.ids[: _boundary(record)])]


def _boundary(record: Record) -> int:
    return len(record.ids) - len(record.ids) // HELD_OUT_SHARE


def _stretches(ids: np.ndarray) -> list[np.ndarray]:
    """Return what stands between the gaps, of two bases and more."""
    edges = np.flatnonzero(np.diff(ids == NOT_READ, prepend=False, append=False)).reshape(-1, 2)
    gaps = edges[edges[:, 1] - edges[:, 0] >= SHORTEST_GAP]
    starts, ends = [0, *gaps[:, 1].tolist()], [*gaps[:, 0].tolist(), len(ids)]
    return [ids[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 1]


def _known(stretches: Sequence[np.ndarray]) -> int:
    return sum(int((ids != NOT_READ).sum()) for ids in stretches)


def _batch(windows: Sequence[np.ndarray]) -> Batch:
    bases = np.stack(windows).astype(np.int32)
    targets = bases[:, 1:]
    return {"inputs": bases[:, :-1], "labels": np.where(targets == NOT_READ, NO_LABEL, targets)}

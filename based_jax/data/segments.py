"""Batches of a synthetic task: segments of examples of one length each, made once, learned in order, tested by name.

A task is a frozen config with training and test segments (`SegmentedTask`); what it asks is its own module's matter.
In all of them labels are NO_LABEL where nothing is asked, and a label stands at the position whose output is judged.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from based_jax.data.checks import check_choice, check_ints, check_seed
from based_jax.data.hosts import Rows, own_rows
from based_jax.errors import UserError, unknown
from based_jax.labels import NO_LABEL

Examples = tuple[np.ndarray, np.ndarray]
Batch = dict[str, np.ndarray]
Split = Literal["train", "test"]


class TaskSegment(Protocol):
    """Examples of one length and one difficulty."""

    @property
    def num_examples(self) -> int:
        """Rows of the segment."""
        ...

    @property
    def seq_len(self) -> int:
        """Positions of a row."""
        ...

    @property
    def name(self) -> str:
        """What tells the segment from the others of its task, such as "64x4"."""
        ...


@dataclasses.dataclass(frozen=True)
class LengthSegment:
    """Examples of one length, in tasks where nothing else makes an example easy or hard."""

    num_examples: int
    seq_len: int

    @property
    def name(self) -> str:
        """The length, such as "128"."""
        return str(self.seq_len)


class SegmentedTask(Protocol):
    """A whole synthetic task, a frozen dataclass: training segments in the order of learning, and test segments."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def train(self) -> Sequence[TaskSegment]:
        """At least one segment."""
        ...

    @property
    def test(self) -> Sequence[TaskSegment]:
        """Segments of distinct names."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids: inputs and labels are below it."""
        ...

    @property
    def seed(self) -> int:
        """Determines all examples and the order of a shuffled epoch."""
        ...

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len): a pure function of the task."""
        ...


def segment_seeds(seed: int, num_train: int, num_test: int) -> tuple[list[int], list[int]]:
    """Return one seed per training and per test segment (zoology/data/utils.py); the two kinds never coincide."""
    rng = np.random.RandomState(seed)
    train = rng.randint(0, 2**31, size=num_train, dtype=np.int64)
    test = rng.randint(2**31, 2**32, size=num_test, dtype=np.int64)
    return train.tolist(), test.tolist()


def segment_and_seed[S: TaskSegment](
    train: tuple[S, ...], test: tuple[S, ...], seed: int, split: Split, index: int
) -> tuple[S, int]:
    """Return a task's segment and the seed of its examples; UserError for an unknown split."""
    check_choice("split", split, ("train", "test"))
    train_seeds, test_seeds = segment_seeds(seed, len(train), len(test))
    return (train[index], train_seeds[index]) if split == "train" else (test[index], test_seeds[index])


def check_segments(what: str, train: Sequence[TaskSegment], test: Sequence[TaskSegment], seed: int) -> None:
    """Check what all tasks ask of their segments and of their seed.

    Raises:
      UserError: no training segment, two test segments of one name, an empty segment, or a seed outside [0, 2**32).
    """
    for name, segments in {"train": train, "test": test}.items():
        if not isinstance(segments, tuple) or not all(hasattr(segment, "num_examples") for segment in segments):
            raise UserError(f"{what}: {name} is {segments!r:.80}; it is a tuple of segments.")
    for segment in (*train, *test):
        check_ints(num_examples=segment.num_examples)
        if segment.num_examples < 1:
            raise UserError(f"{what} needs at least 1 example in a segment, not {segment.num_examples}.")
    names = [segment.name for segment in test]
    if not train or len(set(names)) < len(names):
        raise UserError(f"{what} needs a training segment and distinct test segments, not {train} and {names}.")
    check_seed(seed)


class SegmentSource:
    """Batches of a synthetic task: {"inputs", "labels"} of shape (rows, seq_len), int32.

    Batch t is a pure function of (task, batch_size, shuffle, t). Segments are never mixed, so the length differs from
    batch to batch. Without `shuffle` an epoch reads the segments in their order, as zoology does; with it every epoch
    permutes the examples of each segment and the order of the batches. A segment's short last batch is filled up with
    rows whose labels are all NO_LABEL, which leaves a mean over the labelled positions unchanged.
    A host gets its `rows` of every batch, all where they are None.
    """

    def __init__(
        self,
        task: SegmentedTask,
        batch_size: int,
        *,
        shuffle: bool = False,
        rows: Rows | None = None,
    ):
        self.task, self.batch_size, self.shuffle = task, batch_size, shuffle
        self._own = own_rows(batch_size, rows)
        self._examples: dict[tuple[Split, int], Examples] = {}
        self._epoch: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over all training segments."""
        return sum(-(-segment.num_examples // self.batch_size) for segment in self.task.train)

    @property
    def summary(self) -> tuple[str, ...]:
        """Both splits' sizes, a line each."""
        return tuple(f"{split}: {_size(getattr(self.task, split))}" for split in ("train", "test"))

    @property
    def record(self) -> dict[str, Any]:
        """Nothing: examples depend on the task alone."""
        return {}

    def batch(self, step: int) -> Batch:
        """Return this host's rows of training batch `step`, counted from 0 through all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self.order(epoch))
        index, rows = self._epoch[1][position]
        return self._rows("train", index, rows)

    @property
    def eval_names(self) -> tuple[str, ...]:
        """The test segments, such as "64x4"."""
        return tuple(segment.name for segment in self.task.test)

    def eval_batches(self, name: str) -> Iterator[Batch]:
        """Yield this host's rows of the test segment `name`, once, in order; UserError for an unknown name."""
        if name not in self.eval_names:
            raise unknown("test segment", name, self.eval_names)
        index = self.eval_names.index(name)
        rows = np.arange(self.task.test[index].num_examples)
        for start in range(0, len(rows), self.batch_size):
            yield self._rows("test", index, rows[start : start + self.batch_size])

    def order(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Return the batches of an epoch, each as (training segment, rows of its examples); the last may be short.

        Batch t is entry t % steps_per_epoch of epoch t // steps_per_epoch, on all hosts together.
        """
        rng = np.random.default_rng((self.task.seed, epoch))
        batches = []
        for index, segment in enumerate(self.task.train):
            rows = rng.permutation(segment.num_examples) if self.shuffle else np.arange(segment.num_examples)
            batches += [(index, rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def examples(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a whole segment, int32 (num_examples, seq_len), made at first use and kept."""
        if (split, index) not in self._examples:
            try:
                self._examples[split, index] = self.task.generate(split, index)
            except MemoryError:
                segment = getattr(self.task, split)[index]
                raise UserError(
                    f"{segment.num_examples} examples of {segment.seq_len} tokens do not fit into memory; make fewer."
                ) from None
        return self._examples[split, index]

    def make_all(self, starmap: Callable[..., Iterable[Examples]] = itertools.starmap) -> None:
        """Make the examples of all segments at once; `starmap` may be that of a pool of processes."""
        splits: list[tuple[Split, int]] = [("train", i) for i in range(len(self.task.train))]
        splits += [("test", i) for i in range(len(self.task.test))]
        left = [key for key in splits if key not in self._examples]
        self._examples |= zip(left, starmap(self.task.generate, left), strict=True)

    def _rows(self, split: Split, index: int, rows: np.ndarray) -> Batch:
        """Return this host's part of the batch of these rows, filled up to the full batch size."""
        inputs, labels = self.examples(split, index)
        own = np.pad(rows, (0, self.batch_size - len(rows)), constant_values=-1)[self._own]
        filled = own[:, None] < 0
        return {"inputs": np.where(filled, 0, inputs[own]), "labels": np.where(filled, NO_LABEL, labels[own])}


def _size(segments: Sequence[TaskSegment]) -> str:
    tokens = sum(segment.num_examples * segment.seq_len for segment in segments)
    examples = sum(segment.num_examples for segment in segments)
    lengths = sorted({segment.seq_len for segment in segments})
    return f"{tokens:,} tokens, {examples:,} examples of {' '.join(f'{length:,}' for length in lengths)}"

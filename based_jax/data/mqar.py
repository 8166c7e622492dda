"""Multi-query associative recall (MQAR): key-value pairs, then each key once more, to be answered with its value.

    inputs   k1 v1 k2 v2 k3 v3 | k2  ~  ~  ~ k1  ~ k3  ~  ~  ~      ~ is filler
    labels    .  .  .  .  .  . | v2  .  .  . v1  . v3  .  .  .      . is IGNORE

A label stands at its query's own position: the model is asked for the value right where it reads the key again.
Keys come from [1, vocab/2), values from [vocab/2, vocab). The gap before a query follows a power law: most are short.
Examples equal those of HazyResearch/zoology (zoology/data/multiquery_ar.py) in everything but the filler, which zoology
takes from the global generator of another library.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from based_jax.data.hosts import own_rows
from based_jax.data.legacy_random import uniform_choices, weighted_choices
from based_jax.errors import UserError, unknown

IGNORE = -100

Examples = tuple[np.ndarray, np.ndarray]
Batch = dict[str, np.ndarray]


def mqar(
    vocab_size: int,
    num_examples: int,
    seq_len: int,
    num_kv_pairs: int,
    seed: int,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> Examples:
    """Return (inputs, labels), int32 arrays of shape (num_examples, seq_len); labels are IGNORE except at queries.

    A gap of i pairs of positions has a probability proportional to (i + 1) ** (power_a - 1). `random_non_queries`
    replaces the zeros between queries by uniform tokens, which may coincide with keys (in zoology too).
    Raises UserError unless seq_len is even, 4 * num_kv_pairs <= seq_len < vocab_size and 0 <= seed < 2**32.
    """
    _check(vocab_size, num_examples, seq_len, num_kv_pairs, seed)
    rng = np.random.RandomState(seed)
    first_value = vocab_size // 2
    keys = uniform_choices(rng, first_value - 1, num_kv_pairs, num_examples) + 1
    values = uniform_choices(rng, vocab_size - first_value, num_kv_pairs, num_examples) + first_value
    gaps = weighted_choices(rng, gap_weights(seq_len, num_kv_pairs, power_a), num_kv_pairs, num_examples)

    context = 2 * num_kv_pairs
    inputs = np.zeros((num_examples, seq_len), np.int32)
    labels = np.full_like(inputs, IGNORE)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    np.put_along_axis(inputs, context + 2 * gaps, keys.astype(np.int32), axis=1)
    np.put_along_axis(labels, context + 2 * gaps, values.astype(np.int32), axis=1)
    if random_non_queries:
        filler = np.random.default_rng(seed).integers(vocab_size, size=inputs.shape, dtype=np.int32)
        np.copyto(inputs, filler, where=inputs == 0)
    return inputs, labels


def gap_weights(seq_len: int, num_kv_pairs: int, power_a: float) -> np.ndarray:
    """Return the probability of each gap, in pairs of positions, that fits behind the context."""
    space = (seq_len - 2 * num_kv_pairs) // 2
    weights = power_a * np.arange(1, space + 1) ** (power_a - 1)
    return weights / weights.sum()


def _check(vocab_size: int, num_examples: int, seq_len: int, num_kv_pairs: int, seed: int) -> None:
    if num_examples < 1 or num_kv_pairs < 1:
        raise UserError(f"MQAR needs at least 1 example and 1 pair, not {num_examples} and {num_kv_pairs}.")
    if seq_len % 2 or 4 * num_kv_pairs > seq_len:
        raise UserError(f"seq_len {seq_len} must be even and at least 4 times num_kv_pairs ({num_kv_pairs}).")
    if vocab_size <= seq_len:
        raise UserError(f"vocab_size {vocab_size} must be larger than seq_len {seq_len}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} must be at least 0 and below 2**32.")


@dataclass(frozen=True)
class Segment:
    """Examples of one length and one number of pairs."""

    num_examples: int
    seq_len: int
    num_kv_pairs: int

    @property
    def name(self) -> str:
        """The length and the number of pairs, such as "64x4"."""
        return f"{self.seq_len}x{self.num_kv_pairs}"


@dataclass(frozen=True)
class MqarConfig:
    """A whole MQAR task: training segments in the order that they are learned in, and one test set per segment."""

    train: tuple[Segment, ...]
    test: tuple[Segment, ...]
    vocab_size: int = 8192
    seed: int = 123
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self):
        names = [segment.name for segment in self.test]
        if not self.train or len(set(names)) < len(names):
            raise UserError(f"MQAR needs a training segment and distinct test segments, not {self.train} and {names}.")
        for segment in self.train + self.test:
            _check(self.vocab_size, segment.num_examples, segment.seq_len, segment.num_kv_pairs, self.seed)


PRESETS = {
    # Based, Figure 2 (zoology/experiments/paper_configs/arxiv24_based_figure2); batch size 256, 32 for tests, 32 epochs
    "figure2": MqarConfig(
        train=(
            Segment(100_000, 64, 4),
            Segment(20_000, 128, 8),
            Segment(20_000, 256, 16),
            Segment(20_000, 256, 32),
            Segment(20_000, 256, 64),
        ),
        test=(
            Segment(1_000, 64, 4),
            Segment(1_000, 64, 8),
            Segment(1_000, 64, 16),
            Segment(1_000, 128, 32),
            Segment(1_000, 256, 64),
            Segment(1_000, 512, 128),
            Segment(1_000, 1024, 256),
        ),
    ),
    # for tests: two lengths, a short last batch at any batch size above 2
    "tiny": MqarConfig(
        train=(Segment(50, 16, 2), Segment(21, 32, 4)),
        test=(Segment(10, 16, 2), Segment(11, 32, 4)),
        vocab_size=64,
    ),
}


def get_preset(name: str) -> MqarConfig:
    """Return the preset of that name; UserError for an unknown one."""
    if name not in PRESETS:
        raise unknown("MQAR preset", name, PRESETS)
    return PRESETS[name]


def segment_seeds(seed: int, num_train: int, num_test: int) -> tuple[list[int], list[int]]:
    """Return one seed per training and per test segment (zoology/data/utils.py)."""
    rng = np.random.RandomState(seed)
    train = rng.randint(0, 2**31, size=num_train, dtype=np.int64)
    test = rng.randint(2**31, 2**32, size=num_test, dtype=np.int64)
    return train.tolist(), test.tolist()


class MqarSource:
    """Batches of an MQAR task: {"inputs", "labels"} of shape (batch_size / process_count, seq_len), int32.

    Batch t is a pure function of (config, batch_size, shuffle, t). Segments are never mixed, so the length differs from
    batch to batch. Without `shuffle` an epoch reads the segments in their order, as zoology does; with it every epoch
    permutes the examples of each segment and the order of the batches. A segment's short last batch is filled up with
    rows whose labels are all IGNORE, which leaves a mean over the labelled positions unchanged.
    Host p of n gets the p-th of n equal blocks of rows: concatenated in order they are the batch of a single host.
    """

    def __init__(
        self,
        config: MqarConfig,
        batch_size: int,
        *,
        shuffle: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.config, self.batch_size, self.shuffle = config, batch_size, shuffle
        self._own = own_rows(batch_size, process_index, process_count)
        train_seeds, test_seeds = segment_seeds(config.seed, len(config.train), len(config.test))
        self._segments = {
            "train": tuple(zip(config.train, train_seeds, strict=True)),
            "test": tuple(zip(config.test, test_seeds, strict=True)),
        }
        self._examples: dict[tuple[str, int], Examples] = {}
        self._epoch: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over all training segments."""
        return sum(-(-segment.num_examples // self.batch_size) for segment in self.config.train)

    def batch(self, step: int) -> Batch:
        """Return this host's rows of training batch `step`, counted from 0 through all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        index, rows = self._epoch[1][position]
        return self._rows("train", index, rows)

    @property
    def eval_names(self) -> tuple[str, ...]:
        """The test segments, such as "64x4"."""
        return tuple(segment.name for segment in self.config.test)

    def eval_batches(self, name: str) -> Iterator[Batch]:
        """Yield this host's rows of the test segment `name`, once, in order; UserError for an unknown name."""
        if name not in self.eval_names:
            raise unknown("test segment", name, self.eval_names)
        index = self.eval_names.index(name)
        rows = np.arange(self.config.test[index].num_examples)
        for start in range(0, len(rows), self.batch_size):
            yield self._rows("test", index, rows[start : start + self.batch_size])

    def _order(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Return the epoch's batches, each as (segment index, rows of that segment)."""
        rng = np.random.default_rng((self.config.seed, epoch))
        batches = []
        for index, segment in enumerate(self.config.train):
            rows = rng.permutation(segment.num_examples) if self.shuffle else np.arange(segment.num_examples)
            batches += [(index, rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def _rows(self, split: str, index: int, rows: np.ndarray) -> Batch:
        """Return this host's part of the batch of these rows, filled up to the full batch size."""
        inputs, labels = self._generate(split, index)
        own = np.pad(rows, (0, self.batch_size - len(rows)), constant_values=-1)[self._own]
        filled = own[:, None] < 0
        return {"inputs": np.where(filled, 0, inputs[own]), "labels": np.where(filled, IGNORE, labels[own])}

    def _generate(self, split: str, index: int) -> Examples:
        """Return the examples of a segment, made at first use."""
        if (split, index) not in self._examples:
            (segment, seed), task = self._segments[split][index], self.config
            self._examples[split, index] = mqar(
                task.vocab_size,
                segment.num_examples,
                segment.seq_len,
                segment.num_kv_pairs,
                seed,
                task.power_a,
                task.random_non_queries,
            )
        return self._examples[split, index]

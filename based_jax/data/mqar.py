"""Multi-query associative recall (MQAR): key-value pairs, then each key once more, to be answered with its value.

    inputs   k1 v1 k2 v2 k3 v3 | k2  ~  ~  ~ k1  ~ k3  ~  ~  ~      ~ is filler
    labels    .  .  .  .  .  . | v2  .  .  . v1  . v3  .  .  .      . is NO_LABEL

A label stands at its query's own position: the model is asked for the value right where it reads the key again.
Keys come from [1, vocab/2), values from [vocab/2, vocab). The gap before a query follows a power law: most are short.
Examples equal those of HazyResearch/zoology (zoology/data/multiquery_ar.py) in everything but the filler, which zoology
takes from the global generator of another library.
"""

import numbers
from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_bools, check_examples, check_ints
from based_jax.data.legacy_random import uniform_choices, weighted_choices
from based_jax.data.segments import Examples, Split, check_segments, segment_and_seed
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL

MAX_POWER = 10


def mqar(
    vocab_size: int,
    num_examples: int,
    seq_len: int,
    num_kv_pairs: int,
    seed: int,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> Examples:
    """Return (inputs, labels), int32 arrays of shape (num_examples, seq_len); labels are NO_LABEL except at queries.

    A gap of i pairs of positions has a probability proportional to (i + 1) ** (power_a - 1). `random_non_queries`
    replaces the zeros between queries by uniform tokens, which may coincide with keys (in zoology too).
    Raises UserError unless seq_len is even, 4 * num_kv_pairs <= seq_len < vocab_size and 0 <= seed < 2**32.
    """
    _check(vocab_size, num_examples, seq_len, num_kv_pairs, seed)
    check_gaps(power_a, random_non_queries)
    rng = np.random.RandomState(seed)
    first_value = vocab_size // 2
    keys = uniform_choices(rng, first_value - 1, num_kv_pairs, num_examples) + 1
    values = uniform_choices(rng, vocab_size - first_value, num_kv_pairs, num_examples) + first_value
    gaps = weighted_choices(rng, gap_weights(seq_len, num_kv_pairs, power_a), num_kv_pairs, num_examples)
    inputs, labels = lay_out(seq_len, keys, values, keys, values, gaps)
    if random_non_queries:
        fill(inputs, vocab_size, seed)
    return inputs, labels


def lay_out(
    seq_len: int,
    keys: np.ndarray,
    values: np.ndarray,
    queries: np.ndarray,
    answers: np.ndarray,
    gaps: np.ndarray,
) -> Examples:
    """Return (inputs, labels) of pairs (rows, pairs), then queries (rows, queries), each at its gap behind the pairs.

    A gap counts pairs of positions; positions that are neither pair nor query stay 0.
    """
    context = 2 * keys.shape[1]
    inputs = np.zeros((len(keys), seq_len), np.int32)
    labels = np.full_like(inputs, NO_LABEL)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    np.put_along_axis(inputs, context + 2 * gaps, queries.astype(np.int32), axis=1)
    np.put_along_axis(labels, context + 2 * gaps, answers.astype(np.int32), axis=1)
    return inputs, labels


def fill(inputs: np.ndarray, vocab_size: int, seed: int) -> None:
    """Replace the zeros of `inputs`, in place, by uniform tokens that depend on the seed and the shape alone."""
    filler = np.random.default_rng(seed).integers(vocab_size, size=inputs.shape, dtype=np.int32)
    np.copyto(inputs, filler, where=inputs == 0)


def gap_weights(seq_len: int, num_kv_pairs: int, power_a: float) -> np.ndarray:
    """Return the probability of each gap, in pairs of positions, that fits behind that many pairs."""
    space = (seq_len - 2 * num_kv_pairs) // 2
    weights = power_a * np.arange(1.0, space + 1) ** (power_a - 1)
    return weights / weights.sum()


def check_gaps(power_a: float, random_non_queries: bool) -> None:
    """Raise UserError for a power law that leaves some gap without probability, or a flag that is none."""
    check_bools(random_non_queries=random_non_queries)
    if not (isinstance(power_a, numbers.Real) and 0 < power_a <= MAX_POWER):
        raise UserError(f"power_a {power_a!r} must be a number above 0 and at most {MAX_POWER}; 1 is uniform.")


def _check(vocab_size: int, num_examples: int, seq_len: int, num_kv_pairs: int, seed: int) -> None:
    check_ints(vocab_size=vocab_size, num_examples=num_examples, seq_len=seq_len, num_kv_pairs=num_kv_pairs)
    if num_examples < 1 or num_kv_pairs < 1:
        raise UserError(f"MQAR needs at least 1 example and 1 pair, not {num_examples} and {num_kv_pairs}.")
    if seq_len % 2 or 4 * num_kv_pairs > seq_len:
        raise UserError(f"seq_len {seq_len} must be even and at least 4 times num_kv_pairs ({num_kv_pairs}).")
    if vocab_size <= seq_len:
        raise UserError(f"vocab_size {vocab_size} must be larger than seq_len {seq_len}.")
    check_examples(num_examples, seq_len, vocab_size, seed)


@dataclass(frozen=True)
class MqarSegment:
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

    train: tuple[MqarSegment, ...]
    test: tuple[MqarSegment, ...]
    vocab_size: int = 8192
    seed: int = 123
    power_a: float = 0.01
    random_non_queries: bool = True

    title = "MQAR"
    drawn = staticmethod(mqar)
    check = staticmethod(_check)

    def __post_init__(self):
        check_segments(self.title, self.train, self.test, self.seed)
        for segment in self.train + self.test:
            self.check(self.vocab_size, segment.num_examples, segment.seq_len, segment.num_kv_pairs, self.seed)
        check_gaps(self.power_a, self.random_non_queries)

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len)."""
        segment, seed = segment_and_seed(self.train, self.test, self.seed, split, index)
        return self.drawn(
            self.vocab_size,
            segment.num_examples,
            segment.seq_len,
            segment.num_kv_pairs,
            seed,
            self.power_a,
            self.random_non_queries,
        )


PRESETS = {
    # Based, Figure 2 (zoology/experiments/paper_configs/arxiv24_based_figure2); batch size 256, 32 for tests, 32 epochs
    "figure2": MqarConfig(
        train=(
            MqarSegment(100_000, 64, 4),
            MqarSegment(20_000, 128, 8),
            MqarSegment(20_000, 256, 16),
            MqarSegment(20_000, 256, 32),
            MqarSegment(20_000, 256, 64),
        ),
        test=(
            MqarSegment(1_000, 64, 4),
            MqarSegment(1_000, 64, 8),
            MqarSegment(1_000, 64, 16),
            MqarSegment(1_000, 128, 32),
            MqarSegment(1_000, 256, 64),
            MqarSegment(1_000, 512, 128),
            MqarSegment(1_000, 1024, 256),
        ),
    ),
    # for tests: two lengths, a short last batch at any batch size above 2
    "tiny": MqarConfig(
        train=(MqarSegment(50, 16, 2), MqarSegment(21, 32, 4)),
        test=(MqarSegment(10, 16, 2), MqarSegment(11, 32, 4)),
        vocab_size=64,
    ),
}

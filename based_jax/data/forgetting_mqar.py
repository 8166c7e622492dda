"""MQAR with forgetting: keys are written again with other values, and a query asks for the latest one.

    inputs   k1 v1 k2 v2 k1 v3 k3 v4 | k2  ~  ~  ~ k1  ~ k3  ~      ~ is filler
    labels    .  .  .  .  .  .  .  . | v2  .  .  . v3  . v4  .      . is NO_LABEL

As in `mqar.py` but for the context: among its num_kv_pairs + num_updates pairs each key stands once as a new one, and
an update repeats a uniformly chosen key that stands before it, so one key may be written many times. All values of a
row differ. Without updates the examples are those of `mqar`.

The idea is from HazyResearch/zoology (zoology/data/forgetting_mqar.py), which writes all keys first and then updates
some of them once; it draws the j-th update to differ from key j's value and then gives it to another key.
"""

from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_examples, check_ints
from based_jax.data.legacy_random import uniform_choices, weighted_choices
from based_jax.data.mqar import check_gaps, fill, gap_weights, lay_out
from based_jax.data.segments import Examples, Split, check_segments, segment_and_seed
from based_jax.errors import UserError


def forgetting_mqar(
    vocab_size: int,
    num_examples: int,
    seq_len: int,
    num_kv_pairs: int,
    num_updates: int,
    seed: int,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> Examples:
    """Return (inputs, labels), int32 arrays of shape (num_examples, seq_len); labels are NO_LABEL except at queries.

    Raises UserError unless seq_len is even, 4 * num_kv_pairs + 2 * num_updates <= seq_len < vocab_size.
    """
    _check(vocab_size, seq_len, num_kv_pairs, num_updates)
    check_examples(num_examples, seq_len, vocab_size, seed)
    check_gaps(power_a, random_non_queries)
    rng, pairs = np.random.RandomState(seed), num_kv_pairs + num_updates
    first_value = vocab_size // 2
    keys = uniform_choices(rng, first_value - 1, num_kv_pairs, num_examples) + 1
    values = uniform_choices(rng, vocab_size - first_value, pairs, num_examples) + first_value
    gaps = weighted_choices(rng, gap_weights(seq_len, pairs, power_a), num_kv_pairs, num_examples)

    owner = owners(np.random.default_rng((seed, 1)), num_examples, num_kv_pairs, num_updates)
    latest = latest_values(owner, values, num_kv_pairs)
    inputs, labels = lay_out(seq_len, np.take_along_axis(keys, owner, axis=1), values, keys, latest, gaps)
    if random_non_queries:
        fill(inputs, vocab_size, seed)
    return inputs, labels


def owners(rng: np.random.Generator, rows: int, num_kv_pairs: int, num_updates: int) -> np.ndarray:
    """Return (rows, num_kv_pairs + num_updates): which key each pair of the context writes, new keys in order."""
    new = np.ones((rows, num_kv_pairs + num_updates), bool)
    new[:, num_kv_pairs:] = False
    new[:, 1:] = rng.permuted(new[:, 1:], axis=1)  # nothing can be updated before the first key
    known = np.cumsum(new, axis=1)
    return np.where(new, known - 1, rng.integers(known))


def latest_values(owner: np.ndarray, values: np.ndarray, num_kv_pairs: int) -> np.ndarray:
    """Return (rows, num_kv_pairs): the value that each key has after all pairs, from (rows, pairs) owners and values.

    Pair after pair: numpy does not say in which order one assignment treats indices that repeat in several dimensions.
    """
    rows = np.arange(len(owner))
    latest = np.empty((len(owner), num_kv_pairs), values.dtype)
    for pair in range(owner.shape[1]):
        latest[rows, owner[:, pair]] = values[:, pair]
    return latest


def _check(vocab_size: int, seq_len: int, num_kv_pairs: int, num_updates: int) -> None:
    check_ints(vocab_size=vocab_size, seq_len=seq_len, num_kv_pairs=num_kv_pairs, num_updates=num_updates)
    if num_kv_pairs < 1 or num_updates < 0:
        raise UserError(f"num_kv_pairs {num_kv_pairs} must be at least 1 and num_updates {num_updates} at least 0.")
    if seq_len % 2 or 4 * num_kv_pairs + 2 * num_updates > seq_len:
        raise UserError(
            f"seq_len {seq_len} must be even and at least 4 * num_kv_pairs ({num_kv_pairs}) + "
            f"2 * num_updates ({num_updates})."
        )
    if vocab_size <= seq_len:
        raise UserError(f"vocab_size {vocab_size} must be larger than seq_len {seq_len}.")


@dataclass(frozen=True)
class ForgettingMqarSegment:
    """Examples of one length, one number of keys and one number of updates."""

    num_examples: int
    seq_len: int
    num_kv_pairs: int
    num_updates: int

    @property
    def name(self) -> str:
        """The length, the number of keys and that of updates, such as "64x4+8"."""
        return f"{self.seq_len}x{self.num_kv_pairs}+{self.num_updates}"


@dataclass(frozen=True)
class ForgettingMqarConfig:
    """A whole task of MQAR with forgetting."""

    train: tuple[ForgettingMqarSegment, ...]
    test: tuple[ForgettingMqarSegment, ...]
    vocab_size: int = 8192
    seed: int = 123
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self):
        check_segments("MQAR with forgetting", self.train, self.test, self.seed)
        for segment in self.train + self.test:
            _check(self.vocab_size, segment.seq_len, segment.num_kv_pairs, segment.num_updates)
            check_examples(segment.num_examples, segment.seq_len, self.vocab_size, self.seed)
        check_gaps(self.power_a, self.random_non_queries)

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len)."""
        segment, seed = segment_and_seed(self.train, self.test, self.seed, split, index)
        return forgetting_mqar(
            self.vocab_size,
            segment.num_examples,
            segment.seq_len,
            segment.num_kv_pairs,
            segment.num_updates,
            seed,
            self.power_a,
            self.random_non_queries,
        )


PRESETS = {
    # lengths and keys of MQAR's "figure2" as far as updates leave room; numbers of updates of our own
    "default": ForgettingMqarConfig(
        train=(
            ForgettingMqarSegment(100_000, 64, 4, 4),
            ForgettingMqarSegment(20_000, 128, 8, 8),
            ForgettingMqarSegment(20_000, 256, 16, 16),
            ForgettingMqarSegment(20_000, 256, 32, 32),
        ),
        test=(
            ForgettingMqarSegment(1_000, 64, 4, 0),
            ForgettingMqarSegment(1_000, 64, 4, 4),
            ForgettingMqarSegment(1_000, 64, 4, 16),
            ForgettingMqarSegment(1_000, 64, 8, 8),
            ForgettingMqarSegment(1_000, 128, 16, 16),
            ForgettingMqarSegment(1_000, 256, 32, 32),
            ForgettingMqarSegment(1_000, 512, 64, 64),
            ForgettingMqarSegment(1_000, 1024, 128, 128),
        ),
    ),
    "tiny": ForgettingMqarConfig(
        train=(ForgettingMqarSegment(50, 16, 2, 2), ForgettingMqarSegment(21, 32, 4, 4)),
        test=(ForgettingMqarSegment(10, 16, 2, 2), ForgettingMqarSegment(11, 32, 4, 8)),
        vocab_size=64,
    ),
}

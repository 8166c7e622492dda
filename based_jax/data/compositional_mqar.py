"""Compositional MQAR: a value belongs to two keys together, of which neither tells it alone.

    inputs   a1 b2 v1 a2 b1 v2 a1 b1 v3 a2 b2 v4 | a1 b1  ~ a2 b1  ~  ~  ~  ~      ~ is filler
    labels    .  .  .  .  .  .  .  .  .  .  .  . |  . v3  .  . v2  .  .  .  .      . is NO_LABEL

The P pairs of keys of a row are all those of sqrt(P) first and sqrt(P) second keys. First keys come from
[1, vocab/3), second ones from [vocab/3, 2 vocab/3), values from above. A label stands at its query's second key, and
gaps follow MQAR's power law, in steps of three positions. Examples equal those of HazyResearch/zoology
(zoology/data/compositional_mqar.py) in everything but the filler, as in `mqar.py`. What zoology calls continuous MQAR
(stacked_mqar.py) reads vectors instead of ids, which no model here does.
"""

import math
from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_examples, check_ints
from based_jax.data.legacy_random import uniform_choices, weighted_choices
from based_jax.data.mqar import MqarConfig, MqarSegment, check_gaps, fill
from based_jax.data.segments import Examples
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def compositional_mqar(
    vocab_size: int,
    num_examples: int,
    seq_len: int,
    num_kv_pairs: int,
    seed: int,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> Examples:
    """Return (inputs, labels), int32 arrays of shape (num_examples, seq_len); labels are NO_LABEL except at queries.

    Raises UserError unless num_kv_pairs is a square, seq_len is even and 6 * num_kv_pairs <= seq_len < vocab_size.
    """
    _check(vocab_size, num_examples, seq_len, num_kv_pairs, seed)
    check_gaps(power_a, random_non_queries)
    rng, third = np.random.RandomState(seed), vocab_size // 3
    first, second = _key_pairs(rng, third, num_kv_pairs, num_examples)
    values = uniform_choices(rng, vocab_size - 2 * third, num_kv_pairs, num_examples) + 2 * third
    gaps = weighted_choices(rng, _gap_weights(seq_len, num_kv_pairs, power_a), num_kv_pairs, num_examples)
    inputs, labels = _lay_out(seq_len, first, second, values, gaps)
    if random_non_queries:
        fill(inputs, vocab_size, seed)
    return inputs, labels


def _key_pairs(rng: np.random.RandomState, third: int, num_kv_pairs: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first and second keys (rows, pairs), each first one with each second one, in any order."""
    side = math.isqrt(num_kv_pairs)
    first = uniform_choices(rng, third - 1, side, rows) + 1
    second = uniform_choices(rng, third, side, rows) + third
    order = uniform_choices(rng, num_kv_pairs, num_kv_pairs, rows)
    return np.take_along_axis(first, order // side, axis=1), np.take_along_axis(second, order % side, axis=1)


def _gap_weights(seq_len: int, num_kv_pairs: int, power_a: float) -> np.ndarray:
    """Return the probability of each gap, in steps of three positions, that fits behind that many pairs."""
    weights = power_a * np.arange(1.0, seq_len // 3 - num_kv_pairs + 1) ** (power_a - 1)
    return weights / weights.sum()


def _lay_out(seq_len: int, first: np.ndarray, second: np.ndarray, values: np.ndarray, gaps: np.ndarray) -> Examples:
    """Return (inputs, labels) of pairs with their values, then of the pairs as queries, each at its gap."""
    context = 3 * values.shape[1]
    inputs = np.zeros((len(values), seq_len), np.int32)
    labels = np.full_like(inputs, NO_LABEL)
    for place, tokens in enumerate((first, second, values)):
        inputs[:, place:context:3] = tokens
    np.put_along_axis(inputs, context + 3 * gaps, first.astype(np.int32), axis=1)
    np.put_along_axis(inputs, context + 3 * gaps + 1, second.astype(np.int32), axis=1)
    np.put_along_axis(labels, context + 3 * gaps + 1, values.astype(np.int32), axis=1)
    return inputs, labels


def _check(vocab_size: int, num_examples: int, seq_len: int, num_kv_pairs: int, seed: int) -> None:
    check_ints(vocab_size=vocab_size, seq_len=seq_len, num_kv_pairs=num_kv_pairs)
    if num_kv_pairs < 1 or math.isqrt(num_kv_pairs) ** 2 != num_kv_pairs:
        raise UserError(f"num_kv_pairs is {num_kv_pairs}; it is a square, such as 4, 9 or 16.")
    if seq_len % 2 or 6 * num_kv_pairs > seq_len:
        raise UserError(f"seq_len {seq_len} must be even and at least 6 times num_kv_pairs ({num_kv_pairs}).")
    if vocab_size <= seq_len:
        raise UserError(f"vocab_size {vocab_size} must be larger than seq_len {seq_len}.")
    check_examples(num_examples, seq_len, vocab_size, seed)


@dataclass(frozen=True)
class CompositionalMqarConfig(MqarConfig):
    """A whole task of compositional MQAR, of segments like MQAR's."""

    title = "Compositional MQAR"
    drawn = staticmethod(compositional_mqar)
    check = staticmethod(_check)


PRESETS = {
    # lengths of MQAR's "figure2", with squares of pairs as far as they have room
    "default": CompositionalMqarConfig(
        train=(
            MqarSegment(100_000, 64, 4),
            MqarSegment(20_000, 128, 9),
            MqarSegment(20_000, 256, 16),
            MqarSegment(20_000, 256, 36),
        ),
        test=(
            MqarSegment(1_000, 64, 4),
            MqarSegment(1_000, 64, 9),
            MqarSegment(1_000, 128, 16),
            MqarSegment(1_000, 256, 36),
            MqarSegment(1_000, 512, 64),
            MqarSegment(1_000, 1024, 144),
        ),
    ),
    "tiny": CompositionalMqarConfig(
        train=(MqarSegment(50, 24, 4), MqarSegment(21, 32, 4)),
        test=(MqarSegment(10, 24, 4), MqarSegment(11, 32, 1)),
        vocab_size=64,
    ),
}

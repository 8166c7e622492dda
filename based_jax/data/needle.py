"""A needle in a haystack: key-value pairs at one depth of a long filler, their keys asked again at the end.

    inputs   ~  ~  ~ k1 v1 k2 v2  ~  ~  ~  ~  ~ k2 k1      ~ is filler
    labels   .  .  .  .  .  .  .  .  .  .  .  . v2 v1      . is NO_LABEL

The form of Kamradt's test (2023) and of RULER's retrieval tasks (Hsieh et al. 2024) without their English: accuracy
over length and depth shows where a mixer loses what it read. As in MQAR a label stands at its query's own position.
Keys are [0, vocab/2); values and filler share [vocab/2, vocab), so only its key tells a value from the filler.
"""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_examples, check_ints
from based_jax.data.draws import distinct
from based_jax.data.segments import Examples, Split, check_segments, segment_and_seed
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def needle(
    vocab_size: int, num_examples: int, seq_len: int, seed: int, depth: float | None = None, num_needles: int = 1
) -> Examples:
    """Return (inputs, labels), int32 (num_examples, seq_len); the last `num_needles` positions are asked.

    Args:
      vocab_size, num_examples, seq_len, seed: as in `mqar`.
      depth: where the pairs stand, one after the other: from 0, the row's start, to 1, right before the queries;
        None draws a uniform place for every row.
      num_needles: pairs, whose keys and whose values differ.

    Raises UserError unless 3 * num_needles <= seq_len, 2 * num_needles <= vocab_size and 0 <= depth <= 1.
    """
    _check(vocab_size, seq_len, depth, num_needles)
    check_examples(num_examples, seq_len, vocab_size, seed)
    rng = np.random.default_rng(seed)
    first_value, last_place = vocab_size // 2, seq_len - 3 * num_needles
    keys = distinct(rng, first_value, num_needles, num_examples)
    values = distinct(rng, vocab_size - first_value, num_needles, num_examples) + first_value
    order = rng.permuted(np.tile(np.arange(num_needles), (num_examples, 1)), axis=1)
    any_place = rng.integers(last_place + 1, size=num_examples)
    place = any_place if depth is None else np.full(num_examples, round(depth * last_place))

    inputs = rng.integers(first_value, vocab_size, size=(num_examples, seq_len), dtype=np.int32)
    labels = np.full_like(inputs, NO_LABEL)
    pairs = np.stack([keys, values], axis=-1).reshape(num_examples, -1).astype(np.int32)
    np.put_along_axis(inputs, place[:, None] + np.arange(2 * num_needles), pairs, axis=1)
    inputs[:, -num_needles:] = np.take_along_axis(keys, order, axis=1)
    labels[:, -num_needles:] = np.take_along_axis(values, order, axis=1)
    return inputs, labels


def _check(vocab_size: int, seq_len: int, depth: float | None, num_needles: int) -> None:
    check_ints(vocab_size=vocab_size, seq_len=seq_len, num_needles=num_needles)
    if num_needles < 1 or 3 * num_needles > seq_len:
        raise UserError(f"num_needles {num_needles} must be at least 1 and at most a third of seq_len {seq_len}.")
    if 2 * num_needles > vocab_size:
        raise UserError(f"vocab_size {vocab_size} must be at least 2 * num_needles ({num_needles}).")
    if depth is not None and not (isinstance(depth, numbers.Real) and 0 <= depth <= 1):
        raise UserError(f"depth {depth} must be from 0 to 1, or None for any.")


@dataclass(frozen=True)
class NeedleSegment:
    """Examples of one length, one depth (None for any) and one number of needles."""

    num_examples: int
    seq_len: int
    depth: float | None = None
    num_needles: int = 1

    @property
    def name(self) -> str:
        """The length, the number of needles where it is not one, and the depth: "1024@0.25", "1024x4@any"."""
        needles = "" if self.num_needles == 1 else f"x{self.num_needles}"
        return f"{self.seq_len}{needles}@{'any' if self.depth is None else f'{self.depth:g}'}"


@dataclass(frozen=True)
class NeedleConfig:
    """A whole needle task."""

    train: tuple[NeedleSegment, ...]
    test: tuple[NeedleSegment, ...]
    vocab_size: int = 8192
    seed: int = 123

    def __post_init__(self):
        check_segments("Needle", self.train, self.test, self.seed)
        for segment in self.train + self.test:
            _check(self.vocab_size, segment.seq_len, segment.depth, segment.num_needles)
            check_examples(segment.num_examples, segment.seq_len, self.vocab_size, self.seed)

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len)."""
        segment, seed = segment_and_seed(self.train, self.test, self.seed, split, index)
        return needle(self.vocab_size, segment.num_examples, segment.seq_len, seed, segment.depth, segment.num_needles)


def grid(
    num_examples: int, lengths: Sequence[int], depths: Sequence[float], num_needles: int = 1
) -> tuple[NeedleSegment, ...]:
    """Return a segment for each length and depth, depths of one length together."""
    return tuple(NeedleSegment(num_examples, length, depth, num_needles) for length in lengths for depth in depths)


PRESETS = {
    # sizes of our own: the longest test is twice the longest training row
    "default": NeedleConfig(
        train=(NeedleSegment(20_000, 256), NeedleSegment(20_000, 512), NeedleSegment(20_000, 1024)),
        test=grid(250, (256, 512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 1.0)),
    ),
    "tiny": NeedleConfig(
        train=(NeedleSegment(50, 16), NeedleSegment(21, 32, None, 2)),
        test=(*grid(10, (16, 32), (0.0, 0.5, 1.0)), NeedleSegment(11, 32, None, 2)),
        vocab_size=64,
    ),
}

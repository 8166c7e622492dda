"""Induction heads: what followed the special token the first time has to follow it the second time.

    inputs   4  1  s  7  0  1  3  s      s is the special token, which stands nowhere else
    labels   .  .  .  .  .  .  .  7      . is NO_LABEL

From H3 (Fu et al. 2023, section 3.1); Mamba (Gu and Dao 2023, section 4.1.2 and appendix E.1) trains at length 256 and
tests lengths from 2**6 to 2**20. The special token is vocab_size - 1; all others are uniform.
"""

from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_examples, check_ints
from based_jax.data.segments import Examples, LengthSegment, Split, check_segments, segment_and_seed
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def induction_heads(vocab_size: int, num_examples: int, seq_len: int, seed: int) -> Examples:
    """Return (inputs, labels), int32 (num_examples, seq_len); the last position is asked.

    The first special token stands anywhere but in the last two positions, the answer behind it.
    Raises UserError unless vocab_size >= 3 and seq_len >= 3.
    """
    _check(vocab_size, seq_len)
    check_examples(num_examples, seq_len, vocab_size, seed)
    rng = np.random.default_rng(seed)
    special = vocab_size - 1
    rows, place = np.arange(num_examples), rng.integers(seq_len - 2, size=num_examples)
    inputs = rng.integers(special, size=(num_examples, seq_len), dtype=np.int32)
    inputs[rows, place] = special
    inputs[:, -1] = special
    labels = np.full_like(inputs, NO_LABEL)
    labels[:, -1] = inputs[rows, place + 1]
    return inputs, labels


def _check(vocab_size: int, seq_len: int) -> None:
    check_ints(vocab_size=vocab_size, seq_len=seq_len)
    if vocab_size < 3:
        raise UserError(f"vocab_size {vocab_size} must be at least 3: two tokens and the special one.")
    if seq_len < 3:
        raise UserError(f"seq_len {seq_len} must be at least 3: the special token, the answer, the special token.")


@dataclass(frozen=True)
class InductionHeadsConfig:
    """A whole induction heads task."""

    train: tuple[LengthSegment, ...]
    test: tuple[LengthSegment, ...]
    vocab_size: int = 16
    seed: int = 123

    def __post_init__(self):
        check_segments("Induction heads", self.train, self.test, self.seed)
        for segment in self.train + self.test:
            _check(self.vocab_size, segment.seq_len)
            check_examples(segment.num_examples, segment.seq_len, self.vocab_size, self.seed)

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len)."""
        segment, seed = segment_and_seed(self.train, self.test, self.seed, split, index)
        return induction_heads(self.vocab_size, segment.num_examples, segment.seq_len, seed)


PRESETS = {
    # Mamba's training length and vocabulary; it draws new data at every step, and tests up to 2**20
    "default": InductionHeadsConfig(
        train=(LengthSegment(25_600, 256),), test=tuple(LengthSegment(256, 2**power) for power in range(6, 13))
    ),
    "tiny": InductionHeadsConfig(
        train=(LengthSegment(50, 16), LengthSegment(21, 32)), test=(LengthSegment(10, 16), LengthSegment(11, 32))
    ),
}

"""Selective copying: tokens scattered among blanks, then copied in their order, the blanks left out.

    inputs   ~  3  ~  ~  7  ~  5  ~  c  ~  ~  ~      ~ is the blank, c the copy token
    labels   .  .  .  .  .  .  .  .  .  3  7  5      . is NO_LABEL

Gaps differ from row to row, so a mixer whose weights do not depend on the input cannot know what to keep (Mamba, Gu and
Dao 2023, section 3.1). Rows are laid out as in the MAD benchmark (Poli et al. 2024; athms/mad-lab
mad/data/instances.py): the ids are vocab_size - 2 tokens, the blank, the copy token. Positions are uniform here; there
the last token always stands right before the copy token, and the gaps ignore the seed.
"""

from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_examples, check_ints
from based_jax.data.draws import distinct
from based_jax.data.segments import Examples, Split, check_segments, segment_and_seed
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def selective_copying(vocab_size: int, num_examples: int, seq_len: int, num_tokens: int, seed: int) -> Examples:
    """Return (inputs, labels), int32 (num_examples, seq_len); the last `num_tokens` positions are asked.

    Raises UserError unless vocab_size >= 3 and 2 * num_tokens + 1 <= seq_len.
    """
    _check(vocab_size, seq_len, num_tokens)
    check_examples(num_examples, seq_len, vocab_size, seed)
    rng = np.random.default_rng(seed)
    blank, copy, context = vocab_size - 2, vocab_size - 1, seq_len - num_tokens - 1
    tokens = rng.integers(blank, size=(num_examples, num_tokens), dtype=np.int32)
    places = np.sort(distinct(rng, context, num_tokens, num_examples), axis=1)

    inputs = np.full((num_examples, seq_len), blank, np.int32)
    labels = np.full_like(inputs, NO_LABEL)
    np.put_along_axis(inputs, places, tokens, axis=1)
    inputs[:, context] = copy
    labels[:, context + 1 :] = tokens
    return inputs, labels


def _check(vocab_size: int, seq_len: int, num_tokens: int) -> None:
    check_ints(vocab_size=vocab_size, seq_len=seq_len, num_tokens=num_tokens)
    if vocab_size < 3:
        raise UserError(f"vocab_size {vocab_size} must be at least 3: a token, the blank and the copy token.")
    if num_tokens < 1 or 2 * num_tokens + 1 > seq_len:
        raise UserError(f"num_tokens {num_tokens} must be at least 1 and at most {(seq_len - 1) // 2} of {seq_len}.")


@dataclass(frozen=True)
class CopyingSegment:
    """Examples of one length and one number of tokens to copy."""

    num_examples: int
    seq_len: int
    num_tokens: int

    @property
    def name(self) -> str:
        """The length and the number of tokens, such as "256x16"."""
        return f"{self.seq_len}x{self.num_tokens}"


@dataclass(frozen=True)
class SelectiveCopyingConfig:
    """A whole selective copying task."""

    train: tuple[CopyingSegment, ...]
    test: tuple[CopyingSegment, ...]
    vocab_size: int = 16
    seed: int = 123

    def __post_init__(self):
        check_segments("Selective copying", self.train, self.test, self.seed)
        for segment in self.train + self.test:
            _check(self.vocab_size, segment.seq_len, segment.num_tokens)
            check_examples(segment.num_examples, segment.seq_len, self.vocab_size, self.seed)

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len)."""
        segment, seed = segment_and_seed(self.train, self.test, self.seed, split, index)
        return selective_copying(self.vocab_size, segment.num_examples, segment.seq_len, segment.num_tokens, seed)


PRESETS = {
    # MAD's baseline (athms/mad-lab configs/tasks/selective-copying.yml, mad/configs.py)
    "default": SelectiveCopyingConfig(train=(CopyingSegment(12_800, 256, 16),), test=(CopyingSegment(1_280, 256, 16),)),
    # Mamba, appendix E.1: 16 ids with the blank, but without our copy token; it trains on new data at every step
    "mamba": SelectiveCopyingConfig(
        train=(CopyingSegment(12_800, 4096, 16),), test=(CopyingSegment(640, 4096, 16),), vocab_size=17
    ),
    "tiny": SelectiveCopyingConfig(
        train=(CopyingSegment(50, 16, 3), CopyingSegment(21, 32, 4)),
        test=(CopyingSegment(10, 16, 3), CopyingSegment(11, 32, 4)),
    ),
}

"""Memorization: a fixed dictionary that is nowhere in the context and has to be learned in the weights.

    inputs  k7  ~ k2  ~ k9  ~ k2  ~      ~ is the insert token
    labels   . v7  . v2  . v9  . v2      . is NO_LABEL

From the MAD benchmark (Poli et al. 2024; athms/mad-lab mad/data/instances.py): with n = (vocab_size - 1) // 2 the ids
are n keys, the values, and the insert token, where the value is asked. The dictionary is drawn from the task's seed, so
training and test rows share it; keys are uniform, with repetition. All values differ.
"""

from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_examples, check_ints, check_seed
from based_jax.data.segments import Examples, LengthSegment, Split, check_segments, segment_and_seed
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def dictionary(vocab_size: int, seed: int) -> np.ndarray:
    """Return (keys,) the value of each key, int32; UserError for a bad vocab_size or seed."""
    _check(vocab_size, 2)
    check_seed(seed)
    num_keys = (vocab_size - 1) // 2
    values = np.random.default_rng(seed).permutation(vocab_size - 1 - num_keys)[:num_keys]
    return (num_keys + values).astype(np.int32)


def memorization(vocab_size: int, num_examples: int, seq_len: int, seed: int, dictionary_seed: int) -> Examples:
    """Return (inputs, labels), int32 (num_examples, seq_len); every second position is asked.

    Raises UserError unless vocab_size >= 3 and seq_len is even.
    """
    _check(vocab_size, seq_len)
    check_examples(num_examples, seq_len, vocab_size, seed)
    values = dictionary(vocab_size, dictionary_seed)
    keys = np.random.default_rng(seed).integers(len(values), size=(num_examples, seq_len // 2), dtype=np.int32)
    inputs = np.full((num_examples, seq_len), vocab_size - 1, np.int32)
    labels = np.full_like(inputs, NO_LABEL)
    inputs[:, 0::2] = keys
    labels[:, 1::2] = values[keys]
    return inputs, labels


def _check(vocab_size: int, seq_len: int) -> None:
    check_ints(vocab_size=vocab_size, seq_len=seq_len)
    if vocab_size < 3:
        raise UserError(f"vocab_size {vocab_size} must be at least 3: a key, a value and the insert token.")
    if seq_len < 2 or seq_len % 2:
        raise UserError(f"seq_len {seq_len} must be even and at least 2.")


@dataclass(frozen=True)
class MemorizationConfig:
    """A whole memorization task; the vocabulary sets how many facts there are to learn."""

    train: tuple[LengthSegment, ...]
    test: tuple[LengthSegment, ...]
    vocab_size: int = 256
    seed: int = 123

    def __post_init__(self):
        check_segments("Memorization", self.train, self.test, self.seed)
        for segment in self.train + self.test:
            _check(self.vocab_size, segment.seq_len)
            check_examples(segment.num_examples, segment.seq_len, self.vocab_size, self.seed)

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len)."""
        segment, seed = segment_and_seed(self.train, self.test, self.seed, split, index)
        return memorization(self.vocab_size, segment.num_examples, segment.seq_len, seed, self.seed)


PRESETS = {
    # MAD's baseline (athms/mad-lab configs/tasks/memorization.yml, mad/configs.py)
    "default": MemorizationConfig(train=(LengthSegment(256, 32),), test=(LengthSegment(1_280, 32),)),
    "tiny": MemorizationConfig(
        train=(LengthSegment(50, 16), LengthSegment(21, 32)),
        test=(LengthSegment(10, 16), LengthSegment(11, 32)),
        vocab_size=16,
    ),
}

"""State tracking: the running product of a row of group elements, asked at every position.

    inputs   1  0  1  1  0      parity: 1 swaps, 0 does not
    labels   1  1  0  1  1      the product of all inputs so far, this one included

With S5, whose elements are the 120 permutations of five things, this is a word problem complete for NC1: linear
recurrences with diagonal transitions cannot solve it at every length unless TC0 = NC1 (Merrill et al. 2024, "The
illusion of state"), nor parity where no transition has a negative eigenvalue (Grazzi et al. 2025). So tests are longer
than training.

An element's id is its permutation's place in lexicographic order; 0 is the identity. The first input acts first: p
sends thing i to p[i], and q sends that on, so p followed by q is i -> q[p[i]].
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_choice, check_examples, check_ints
from based_jax.data.segments import Examples, LengthSegment, Split, check_segments, segment_and_seed
from based_jax.errors import UserError

Permutation = tuple[int, ...]


def symmetric(size: int) -> list[Permutation]:
    """Return all permutations of `size` things in lexicographic order."""
    return list(itertools.permutations(range(size)))


def is_even(permutation: Permutation) -> bool:
    """Return whether an even number of swaps makes the permutation."""
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def products(group: Sequence[Permutation]) -> np.ndarray:
    """Return (elements, elements) int32: entry [p, q] is the id of p followed by q."""
    ids = {permutation: i for i, permutation in enumerate(group)}
    return np.array([[ids[tuple(q[i] for i in p)] for q in group] for p in group], np.int32)


GROUPS = {
    "parity": symmetric(2),
    "s3": symmetric(3),
    "a5": [permutation for permutation in symmetric(5) if is_even(permutation)],
    "s5": symmetric(5),
}


def state_tracking(group: str, num_examples: int, seq_len: int, seed: int) -> Examples:
    """Return (inputs, labels), int32 (num_examples, seq_len), ids of elements of `GROUPS[group]`; all are asked.

    Inputs are uniform, so the label at a single position is uniform too. UserError for an unknown group.
    """
    _check(group, seq_len)
    check_examples(num_examples, seq_len, len(GROUPS[group]), seed)
    table = products(GROUPS[group])
    inputs = np.random.default_rng(seed).integers(len(table), size=(num_examples, seq_len), dtype=np.int32)
    labels = inputs.copy()
    for position in range(1, seq_len):
        labels[:, position] = table[labels[:, position - 1], inputs[:, position]]
    return inputs, labels


def _check(group: str, seq_len: int) -> None:
    check_ints(seq_len=seq_len)
    check_choice("group", group, GROUPS)
    if seq_len < 1:
        raise UserError(f"seq_len {seq_len} must be at least 1.")


@dataclass(frozen=True)
class StateTrackingConfig:
    """A whole state tracking task over one of `GROUPS`."""

    train: tuple[LengthSegment, ...]
    test: tuple[LengthSegment, ...]
    group: str = "s5"
    seed: int = 123

    def __post_init__(self):
        check_segments("State tracking", self.train, self.test, self.seed)
        for segment in self.train + self.test:
            _check(self.group, segment.seq_len)
            check_examples(segment.num_examples, segment.seq_len, self.vocab_size, self.seed)

    @property
    def vocab_size(self) -> int:
        """Elements of the group."""
        return len(GROUPS[self.group])

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len)."""
        segment, seed = segment_and_seed(self.train, self.test, self.seed, split, index)
        return state_tracking(self.group, segment.num_examples, segment.seq_len, seed)


_LENGTHS = tuple(LengthSegment(1_000, seq_len) for seq_len in (32, 64, 128, 256))

PRESETS = {
    # lengths and numbers of examples of our own
    "default": StateTrackingConfig(train=(LengthSegment(100_000, 32),), test=_LENGTHS),
    "parity": StateTrackingConfig(train=(LengthSegment(100_000, 32),), test=_LENGTHS, group="parity"),
    "tiny": StateTrackingConfig(
        train=(LengthSegment(50, 8), LengthSegment(21, 16)),
        test=(LengthSegment(10, 16), LengthSegment(11, 32)),
        group="s3",
    ),
}

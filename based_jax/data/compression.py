"""Compression: a row of random symbols, a compression token, and then each position asked for its symbol.

    inputs   3  0  2  c p1 p3 p2      c is the compression token, p1 the query of the first position
    labels   .  .  .  .  3  2  0      . is NO_LABEL

After the compression task of the MAD benchmark (Poli et al. 2024; athms/mad-lab mad/data/instances.py), in a causal
form. There an encoder's output at the compression token alone goes, with a position's embedding, through an MLP that
decodes each symbol. Here the same model goes on reading: queries are tokens, in a new random order in every row, so
nothing can be dropped before its turn. What bounds a recurrent mixer is the state behind the compression token;
attention is not bound, since its queries also see the symbols themselves.

The ids are the symbols, the compression token, and one query for each of `max_symbols` positions.
"""

from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_examples, check_ints
from based_jax.data.segments import Examples, Split, check_segments, segment_and_seed
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL


def compression(alphabet: int, max_symbols: int, num_examples: int, num_symbols: int, seed: int) -> Examples:
    """Return (inputs, labels), int32 (num_examples, 2 * num_symbols + 1); the last `num_symbols` positions are asked.

    Symbols are uniform over [0, alphabet); the query of position i is alphabet + 1 + i.
    Raises UserError unless alphabet >= 2 and 1 <= num_symbols <= max_symbols.
    """
    _check(alphabet, max_symbols, num_symbols)
    check_examples(num_examples, 2 * num_symbols + 1, alphabet + 1 + max_symbols, seed)
    rng = np.random.default_rng(seed)
    symbols = rng.integers(alphabet, size=(num_examples, num_symbols), dtype=np.int32)
    order = rng.permuted(np.tile(np.arange(num_symbols, dtype=np.int32), (num_examples, 1)), axis=1)
    token = np.full((num_examples, 1), alphabet, np.int32)
    inputs = np.concatenate([symbols, token, alphabet + 1 + order], axis=1)
    labels = np.full_like(inputs, NO_LABEL)
    labels[:, num_symbols + 1 :] = np.take_along_axis(symbols, order, axis=1)
    return inputs, labels


def _check(alphabet: int, max_symbols: int, num_symbols: int) -> None:
    check_ints(alphabet=alphabet, max_symbols=max_symbols, num_symbols=num_symbols)
    if alphabet < 2:
        raise UserError(f"alphabet {alphabet} must be at least 2.")
    if not 1 <= num_symbols <= max_symbols:
        raise UserError(f"num_symbols {num_symbols} must be at least 1 and at most max_symbols {max_symbols}.")


@dataclass(frozen=True)
class CompressionSegment:
    """Examples of one number of symbols."""

    num_examples: int
    num_symbols: int

    @property
    def seq_len(self) -> int:
        """Symbols, the compression token, and a query for each symbol."""
        return 2 * self.num_symbols + 1

    @property
    def name(self) -> str:
        """The number of symbols, such as "31"."""
        return str(self.num_symbols)


@dataclass(frozen=True)
class CompressionConfig:
    """A whole compression task."""

    train: tuple[CompressionSegment, ...]
    test: tuple[CompressionSegment, ...]
    alphabet: int = 15
    max_symbols: int = 31
    seed: int = 123

    def __post_init__(self):
        check_segments("Compression", self.train, self.test, self.seed)
        for segment in self.train + self.test:
            _check(self.alphabet, self.max_symbols, segment.num_symbols)
            check_examples(segment.num_examples, segment.seq_len, self.vocab_size, self.seed)

    @property
    def vocab_size(self) -> int:
        """Symbols, the compression token and the queries."""
        return self.alphabet + 1 + self.max_symbols

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len)."""
        segment, seed = segment_and_seed(self.train, self.test, self.seed, split, index)
        return compression(self.alphabet, self.max_symbols, segment.num_examples, segment.num_symbols, seed)


PRESETS = {
    # MAD's baseline (athms/mad-lab configs/tasks/compression.yml): 16 ids and length 32, with the compression token
    "default": CompressionConfig(train=(CompressionSegment(12_800, 31),), test=(CompressionSegment(1_280, 31),)),
    "tiny": CompressionConfig(
        train=(CompressionSegment(50, 7), CompressionSegment(21, 15)),
        test=(CompressionSegment(10, 7), CompressionSegment(11, 15)),
        alphabet=4,
        max_symbols=15,
    ),
}

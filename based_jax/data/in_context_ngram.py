"""In-context n-grams: every row has a random language of its own, which only the row itself tells.

    inputs   2  0  1  2  0  1  1  0      a bigram: the distribution of the next token depends on the last one
    labels   .  .  .  0  1  2  0  1      . is NO_LABEL: asked is the next token where this context stood before

Each row draws, for every context of order - 1 tokens, a distribution over the vocabulary from a symmetric Dirichlet,
and then its tokens from these: in-context Markov chains (Edelman et al. 2024, arXiv 2402.11004), the n-gram case of
in-context language learning (Akyürek et al. 2024, arXiv 2401.12973). Tokens are random, so no model is always right;
`best_accuracy` is what the best possible one gets.
"""

import numbers
from dataclasses import dataclass

import numpy as np

from based_jax.data.checks import check_examples, check_ints
from based_jax.data.segments import Examples, LengthSegment, Split, check_segments, segment_and_seed
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL, is_labelled

MAX_TABLE_SIZE = 2**20
MAX_CONCENTRATION = 1e9  # all tokens are about as probable then
MAX_PROBABILITIES_PER_BLOCK = 2**22  # held at once, over the rows that are drawn together


def in_context_ngram(
    vocab_size: int, num_examples: int, seq_len: int, seed: int, order: int = 2, concentration: float = 0.1
) -> Examples:
    """Return (inputs, labels), int32 (num_examples, seq_len).

    The first order - 1 tokens are uniform. A label is the next token, where the last order - 1 tokens stood together
    at an earlier position whose next token has been seen.

    Raises UserError unless vocab_size >= 2, seq_len > order >= 1, vocab_size**order <= 2**20 and concentration > 0.
    """
    _check(vocab_size, seq_len, order, concentration)
    check_examples(num_examples, seq_len, vocab_size, seed)
    rng = np.random.default_rng(seed)
    tokens = np.empty((num_examples, seq_len + 1), np.int32)
    for block in _blocks(tokens, vocab_size, order):
        _draw(rng, block, vocab_size, order, concentration)
    inputs = tokens[:, :-1].copy()
    return inputs, np.where(_seen(inputs, vocab_size, order), tokens[:, 1:], np.int32(NO_LABEL))


def contexts(inputs: np.ndarray, vocab_size: int, order: int) -> np.ndarray:
    """Return (rows, positions) the last order - 1 tokens as one number; those before the row's start count as 0."""
    result = np.zeros(inputs.shape, np.int64)
    for back in range(order - 1):
        result[:, back:] += inputs[:, : inputs.shape[1] - back] * vocab_size**back
    return result


def best_predictions(
    inputs: np.ndarray, vocab_size: int, order: int = 2, concentration: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable next token at every position, and its probability given the tokens so far.

    A Dirichlet posterior: a token that followed the context c times out of n has the probability
    (c + concentration) / (n + vocab_size * concentration), whatever happened in other contexts.

    Args:
      inputs: (rows, positions) tokens.
      vocab_size, order, concentration: those that the rows were drawn with.
    """
    blocks = [_best(block, vocab_size, order, concentration) for block in _blocks(inputs, vocab_size, order)]
    best, probability = zip(*blocks, strict=True)
    return np.concatenate(best), np.concatenate(probability)


def best_accuracy(examples: Examples, vocab_size: int, order: int = 2, concentration: float = 0.1) -> float:
    """Return the expected accuracy of the best possible model on the asked positions of these examples.

    It is the mean probability of the most probable token, so no model that sees only the tokens so far does better on
    average over the rows' hidden languages; on a finite number of examples luck moves the accuracy around it.
    """
    inputs, labels = examples
    _, probability = best_predictions(inputs, vocab_size, order, concentration)
    return float(probability[is_labelled(labels)].mean())


def _blocks(tokens: np.ndarray, vocab_size: int, order: int) -> list[np.ndarray]:
    """Return views of consecutive rows, so few that their tables fit into `MAX_PROBABILITIES_PER_BLOCK` together."""
    rows = max(1, MAX_PROBABILITIES_PER_BLOCK // vocab_size**order)
    return [tokens[i : i + rows] for i in range(0, len(tokens), rows)]


def _draw(rng: np.random.Generator, tokens: np.ndarray, vocab_size: int, order: int, concentration: float) -> None:
    """Fill `tokens` (rows, positions), each row from a table of its own."""
    rows, num_contexts = np.arange(len(tokens)), vocab_size ** (order - 1)
    table = rng.dirichlet(np.full(vocab_size, concentration), size=(len(tokens), num_contexts)).cumsum(axis=-1)
    uniform = rng.random(tokens.shape)
    context = np.zeros(len(tokens), np.int64)
    for position in range(tokens.shape[1]):
        if position < order - 1:
            tokens[:, position] = uniform[:, position] * vocab_size
        else:
            # The last sum is 1 up to rounding: what lies above the one before it is the last token.
            tokens[:, position] = (table[rows, context, :-1] <= uniform[:, position, None]).sum(axis=1)
        context = (context * vocab_size + tokens[:, position]) % num_contexts


def _best(inputs: np.ndarray, vocab_size: int, order: int, concentration: float) -> tuple[np.ndarray, np.ndarray]:
    rows, context = np.arange(len(inputs)), contexts(inputs, vocab_size, order)
    counts = np.zeros((len(inputs), vocab_size ** (order - 1), vocab_size))
    best, probability = np.zeros(inputs.shape, np.int32), np.full(inputs.shape, 1 / vocab_size)
    # A context is whole from position order - 2 on.
    for position in range(max(order - 2, 0), inputs.shape[1]):
        if position >= order - 1:  # of order 1 all contexts are 0, so the wrap at position 0 is right
            counts[rows, context[:, position - 1], inputs[:, position]] += 1
        seen = counts[rows, context[:, position]]
        best[:, position] = seen.argmax(axis=1)
        probability[:, position] = seen.max(axis=1) + concentration
        probability[:, position] /= seen.sum(axis=1) + vocab_size * concentration
    return best, probability


def _seen(inputs: np.ndarray, vocab_size: int, order: int) -> np.ndarray:
    """Return a mask of the positions whose context, all of it tokens of the row, stood at an earlier position."""
    rows, context = np.arange(len(inputs)), contexts(inputs, vocab_size, order)
    before = np.zeros((len(inputs), vocab_size ** (order - 1)), bool)
    seen = np.zeros(inputs.shape, bool)
    for position in range(max(order - 2, 0), inputs.shape[1]):
        seen[:, position] = before[rows, context[:, position]]
        before[rows, context[:, position]] = True
    return seen


def _check(vocab_size: int, seq_len: int, order: int, concentration: float) -> None:
    check_ints(vocab_size=vocab_size, seq_len=seq_len, order=order)
    if vocab_size < 2:
        raise UserError(f"vocab_size {vocab_size} must be at least 2.")
    if not 1 <= order < seq_len:
        raise UserError(f"order {order} must be at least 1 and below seq_len {seq_len}.")
    if order > MAX_TABLE_SIZE.bit_length() or vocab_size**order > MAX_TABLE_SIZE:
        raise UserError(f"vocab_size {vocab_size} to the power of order {order} must be at most {MAX_TABLE_SIZE}.")
    if not (isinstance(concentration, numbers.Real) and 0 < concentration <= MAX_CONCENTRATION):
        raise UserError(f"concentration {concentration!r} must be above 0 and at most {MAX_CONCENTRATION:g}.")


@dataclass(frozen=True)
class InContextNgramConfig:
    """A whole in-context n-gram task; a smaller concentration makes the languages more predictable."""

    train: tuple[LengthSegment, ...]
    test: tuple[LengthSegment, ...]
    vocab_size: int = 8
    seed: int = 123
    order: int = 2
    concentration: float = 0.1

    def __post_init__(self):
        check_segments("In-context n-gram", self.train, self.test, self.seed)
        for segment in self.train + self.test:
            _check(self.vocab_size, segment.seq_len, self.order, self.concentration)
            check_examples(segment.num_examples, segment.seq_len, self.vocab_size, self.seed)

    def generate(self, split: Split, index: int) -> Examples:
        """Return (inputs, labels) of a segment, int32 (num_examples, seq_len)."""
        segment, seed = segment_and_seed(self.train, self.test, self.seed, split, index)
        return in_context_ngram(
            self.vocab_size, segment.num_examples, segment.seq_len, seed, self.order, self.concentration
        )

    def best_accuracy(self, split: Split, index: int) -> float:
        """Return the expected accuracy of the best possible model on a segment (`best_accuracy` of the module)."""
        return best_accuracy(self.generate(split, index), self.vocab_size, self.order, self.concentration)


PRESETS = {
    # sizes of our own
    "default": InContextNgramConfig(
        train=(LengthSegment(25_600, 128),),
        test=(LengthSegment(1_280, 64), LengthSegment(1_280, 128), LengthSegment(1_280, 256)),
    ),
    "tiny": InContextNgramConfig(
        train=(LengthSegment(50, 16), LengthSegment(21, 32)),
        test=(LengthSegment(10, 16), LengthSegment(11, 32)),
        vocab_size=4,
    ),
}

"""Prompts read into caches, chunk by chunk: what is computed at once does not grow with a prompt."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from based_jax.dims import Unbroken
from based_jax.generate.decoder import Caches, Decoder, Layout, Params

CHUNK_TOKENS = 512
PROGRAM_TOKENS = 8192
"""Of all rows' chunks, at least: products of fewer wait for their weights, those of more are no faster."""
FEWEST_TOKENS = 64
"""Of a chunk: the last one of a prompt is as long as the next power of two, so that few programs are compiled."""

Chunk = tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"] | None]
"""Ids, and segment ids (0 for padding) where not all rows have so many tokens."""


def prefill(decoder: Decoder, caches: Caches, prompts: Sequence[np.ndarray], chunk_tokens: int | None = None) -> Caches:
    """Return the caches after the next tokens of each row, of different numbers; those given are used up.

    `chunk_tokens` are those of a row that are read at once, at most; by default `row_tokens`.
    """
    most = row_tokens(len(prompts)) if chunk_tokens is None else chunk_tokens
    for chunk in chunks(prompts, chunk_length(decoder, most)):
        caches = prefill_chunk(decoder, caches, chunk)
    return caches


def prefill_chunk(decoder: Decoder, caches: Caches, chunk: Chunk) -> Caches:
    """Return the caches after a chunk of each row; those given are used up."""
    with decoder.running():
        return _prefill(decoder.layout, decoder.params, caches, *chunk)


def row_tokens(rows: int) -> int:
    """Return the tokens of each of so many rows that are read at once: the fewer rows, the more."""
    return max(CHUNK_TOKENS, 1 << (PROGRAM_TOKENS // rows).bit_length() >> 1)


def chunk_length(decoder: Decoder, chunk_tokens: int) -> int:
    """Return the tokens of a chunk, `chunk_tokens` unless the model has to read more at once."""
    return max(chunk_tokens, _power_of_two(max(decoder.prefix_length, 1)))


def chunks(prompts: Sequence[np.ndarray], chunk_tokens: int) -> Iterator[Chunk]:
    """Yield the tokens of each prompt from its first on, at most `chunk_tokens` at a time; padding is inert.

    What is left of them is read by powers of two, down to `CHUNK_TOKENS`, so that no more than that is padded.
    """
    start, longest = 0, max(map(len, prompts))
    while start < longest:
        most = min(chunk_tokens, max(CHUNK_TOKENS, 1 << (longest - start).bit_length() >> 1))
        yield chunk_of([prompt[start : start + most] for prompt in prompts], most)
        start += most


def chunk_of(parts: Sequence[np.ndarray], most: int) -> Chunk:
    """Return the next tokens of each row, at most so many, with as much padding as makes few lengths."""
    ids, segment_ids = padded(parts, padded_length(max(map(len, parts)), most))
    return ids, None if segment_ids.all() else segment_ids


def padded_length(length: int, most: int) -> int:
    """Return the tokens of a chunk for so many, at most `most`."""
    return min(most, _power_of_two(max(FEWEST_TOKENS, length)))


def padded(parts: Sequence[np.ndarray], length: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Return tokens of each row with padding behind them, and their segment ids."""
    ids, segment_ids = np.zeros((2, len(parts), length), np.int32)
    for row, part in enumerate(parts):
        ids[row, : len(part)] = part
        segment_ids[row, : len(part)] = 1
    return ids, segment_ids


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(layout: Layout, params: Params, caches: Caches, ids, segment_ids) -> Caches:
    return layout.model(params).prefill(ids, caches, segment_ids if segment_ids is None else Unbroken(segment_ids))[1]

"""Many requests through the engine of generation: batches of like lengths, each in caches of its longest."""

from collections.abc import Iterator, Sequence

import numpy as np

from based_jax.data.tokenizer import Tokenizer
from based_jax.generate import Decoder, Request
from based_jax.generate.blocks import blocks
from based_jax.generate.requests import MOST_STOP_IDS
from based_jax.generate.rows import begun

BLOCK_TOKENS = 64
"""Drawn by one run of the compiled loop, which ends before where all of a batch have stopped."""
LEAST_ROOM = 256


def answered(decoder: Decoder, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the place of each request with its new ids, the longest prompts first, so that memory is short at once.

    Raises:
      UserError: a request is not what the model can be asked, before any is answered.
    """
    requests = [x.checked(decoder, decoder.max_len, f"Prompt {place}") for place, x in enumerate(requests)]
    order = sorted(range(len(requests)), key=lambda place: -requests[place].length)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        filled = (places * batch_size)[: min(batch_size, len(order))]  # of one size, so that one program serves all
        yield from zip(places, _batch(decoder, [requests[place] for place in filled]), strict=False)


def text_until(text: str, stops: Sequence[str]) -> str:
    """Return what stands before the first of some texts."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def stop_ids(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[int, ...]:
    """Return ids that begin with one of some texts, and the end of text: what is behind them need not be drawn.

    Other ids may hold one, too: `text_until` has the last word.
    """
    single = [ids[0] for stop in stops for text in (stop, stop + stop) if len(ids := tokenizer.encode(text)) == 1]
    return tuple(dict.fromkeys((tokenizer.end_of_text, *single)))[:MOST_STOP_IDS]


def _batch(decoder: Decoder, requests: Sequence[Request]) -> list[list[int]]:
    """Return the new ids of each request, without one that stops."""
    rows = begun(decoder, requests, _room(requests, decoder.max_len))
    found = list(blocks(decoder, rows, BLOCK_TOKENS))
    return [
        _without_stop(np.concatenate([block.tokens[row, : block.drawn[row]] for block in found]).tolist(), request)
        for row, request in enumerate(requests)
    ]


def _without_stop(ids: list[int], request: Request) -> list[int]:
    return ids[:-1] if ids and ids[-1] in request.stop_ids else ids


def _room(requests: Sequence[Request], max_len: int | None) -> int:
    """Return the room of caches: a power of two, so that few programs are compiled."""
    longest = max(request.length + request.max_new_tokens for request in requests)
    room = 1 << (max(longest, LEAST_ROOM) - 1).bit_length()
    return room if max_len is None else min(room, max_len)

"""Continuations of prompts, all at once or as they are drawn."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.generate.blocks import blocks
from based_jax.generate.decoder import Decoder
from based_jax.generate.drafts import Drafts, check_drafts
from based_jax.generate.prompts import Prompts, check_prefix, checked_prompts, checked_seeds, shown
from based_jax.generate.requests import Request, check_room, checked_request, checked_stop
from based_jax.generate.rows import begun
from based_jax.generate.sampling import GREEDY, Sampling
from based_jax.generate.scheduler import Scheduler
from based_jax.generate.state import State
from based_jax.generate.task import Event
from based_jax.nn.lm import LM

BLOCK_TOKENS = 64
"""Drawn by one run of the compiled loop."""

ROOM_STEP = 256
"""What the room of caches is a multiple of, so that few programs are compiled."""


def generate(
    model: LM,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    stop: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    row_ids: Sequence[int] | None = None,
    state: State | None = None,
    drafts: Drafts | None = None,
) -> list[np.ndarray]:
    """Continue each prompt by up to `max_new_tokens` token ids.

    Prompts of different lengths share a batch: padding enters no state, so that each goes on as alone. A draw depends
    on the seed, on the row's id and on its place in that row's own text: a prompt with its id goes on the same way
    alone as in any batch. The work ends when all rows have stopped. `stream` takes all of it for each prompt of its
    own, and returns tokens as they are drawn.

    Args:
      model: the language model.
      prompts: token ids, at least one each: lists or arrays, of different lengths or one array (B, T).
      max_new_tokens: how many to add.
      sampling: see `Sampling`.
      stop: id that ends a continuation, or several; it is not part of the result.
      seed: of the draws, from 0 to 2^64 - 1; one for all rows, or one for each.
      row_ids: of the draws, one for each prompt, from 0 to 2^32 - 1; by default its index among the prompts.
      state: of what stands before every prompt, which each goes on from.
      drafts: tokens that are drafted for the model to verify; they change the time and not the result.

    Returns:
      The new ids of each prompt, without the prompt.

    Raises:
      UserError: no prompt or an empty one, an id that the model does not have, no tokens to add, more than the
        model reads, a value of another type or range, the state of another model, or drafts that are not for it.
    """
    _check(model, sampling)
    token_ids = checked_prompts(prompts, model.config.vocab_size)
    stops = _stop_ids(stop, model.config.vocab_size)
    check_room(token_ids, max_new_tokens, model.max_len, state)
    draws = checked_seeds(seed, row_ids, len(token_ids))
    requests = [
        Request(ids, int(max_new_tokens), sampling, stops, seed=seed, row_id=row_id, state=state)
        for ids, (seed, row_id) in zip(token_ids, draws, strict=True)
    ]
    decoder = Decoder.of(model)
    check_prefix(token_ids, decoder.prefix_length, 0 if state is None else state.length)
    room = room_for(requests, model.max_len)
    check_drafts(drafts, decoder, room)
    rows = begun(decoder, requests, room, drafts=drafts)
    found = list(blocks(decoder, rows, BLOCK_TOKENS, drafts))
    parts = [[np.asarray(block.tokens[row, : block.drawn[row]]) for block in found] for row in range(len(requests))]
    return [_new_ids(row, stops) for row in parts]


def stream(
    model: LM | Decoder,
    requests: Iterable[Request],
    *,
    tokenizer: Tokenizer | None = None,
    slots: int | None = None,
    block_tokens: int = 8,
    drafts: Drafts | None = None,
) -> Iterator[Event]:
    """Yield tokens of each request as they are drawn, and a finish reason with its last.

    Args:
      model: the language model.
      requests: what to answer; an event's `id` counts them from 0.
      tokenizer: makes text of tokens, in which stop strings are found.
      slots: how many are answered at a time; by default all.
      block_tokens: steps between two events of a request, at most; each draws one token, or more with drafts.
      drafts: as of `generate`.

    Raises:
      UserError: a request is not what the model can be asked, before the first token of any.
    """
    decoder = Decoder.of(model)
    requests = [
        checked_request(request).checked(decoder, decoder.max_len, f"Prompt {i}") for i, request in enumerate(requests)
    ]
    if not requests:
        return
    scheduler = Scheduler(
        decoder,
        slots=len(requests) if slots is None else slots,
        max_len=room_for(requests, decoder.max_len),
        tokenizer=tokenizer,
        block_tokens=block_tokens,
        drafts=drafts,
    )
    for request in requests:
        scheduler.submit(request)
    while scheduler.busy:
        yield from scheduler.advance()


def room_for(requests: Sequence[Request], max_len: int | None) -> int:
    """Return the room of caches for the longest of requests."""
    longest = max(request.length + request.max_new_tokens for request in requests)
    room = -(-longest // ROOM_STEP) * ROOM_STEP
    return room if max_len is None else min(room, max_len)


def _check(model: LM, sampling: Sampling) -> None:
    if not isinstance(model, LM):
        raise UserError(f"model is {shown(model)}; it is an LM.")
    if not isinstance(sampling, Sampling):
        raise UserError(f"sampling is {shown(sampling)}; it is a Sampling, as in Sampling(temperature=0.6).")


def _stop_ids(stop: int | Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    if stop is None:
        return ()
    stops = stop if isinstance(stop, Sequence) and not isinstance(stop, str) else [stop]
    return tuple(checked_stop(value, vocab_size) for value in stops)


def _new_ids(parts: Sequence[np.ndarray], stops: tuple[int, ...]) -> np.ndarray:
    """Return the ids of a row, without that which stopped it."""
    ids = np.concatenate(parts)
    return ids[:-1] if len(ids) and ids[-1] in stops else ids

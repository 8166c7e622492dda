"""Requests that come and go, answered together in a fixed number of slots."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.generate.decoder import Caches, Decoder
from based_jax.generate.prefill import CHUNK_TOKENS, Chunk, chunks, prefill_chunk
from based_jax.generate.requests import Request
from based_jax.generate.rows import Block, Rows, decode
from based_jax.generate.text import TextStream
from based_jax.nn.lm import LM


class Event(NamedTuple):
    """What is new of one request.

    Attributes:
      id: as `Scheduler.submit` gave it.
      tokens: new ids, without one that stops.
      log_probs: of the tokens, by the model's own distribution (temperature 1, nothing cut).
      text: new text, "" where there is no tokenizer; characters and stop strings that are not complete are held back.
      finish: None as long as the request goes on; "stop" at a stop id or string, "length" at `max_new_tokens`.
    """

    id: int
    tokens: list[int]
    log_probs: list[float]
    text: str = ""
    finish: str | None = None


class States(Protocol):
    """What a scheduler asks of a prefix cache."""

    def lookup(self, ids: np.ndarray) -> tuple[Any, int, str | None]:
        """Return caches of one row that have read a prefix of these ids, its length (0), and why it is no longer."""

    def keep(self, ids: np.ndarray, caches: Caches) -> None:
        """Keep the caches of one row that has read these ids; they stay as they are."""


@dataclasses.dataclass(eq=False)
class Task:
    """A request on its way.

    Attributes:
      chunks: of its prompt, those that are still to be read; None before the first.
      read: tokens of its prompt that its caches have read.
      caches: of one row, until it has its slot.
      text: what its tokens say.
      drawn: tokens that it has had.
    """

    id: int
    request: Request
    text: TextStream | None
    chunks: Iterator[Chunk] | None = None
    read: int = 0
    caches: Caches | None = None
    drawn: int = 0

    def event(self, tokens: list[int], log_probs: list[float]) -> Event:
        """Return what newly drawn tokens are of the answer."""
        self.drawn += len(tokens)
        stopped = bool(tokens) and tokens[-1] in self.request.stop_ids
        tokens = tokens[:-1] if stopped else tokens
        text = ""
        if self.text is not None:
            for number, token in enumerate(tokens, 1):
                text += self.text.push(token)
                if self.text.stopped:
                    tokens = tokens[:number]
                    break
        ended = stopped or self.drawn == self.request.max_new_tokens
        if self.text is not None and ended:
            text += self.text.finish()
        stopped |= self.text is not None and self.text.stopped
        finish = "stop" if stopped else "length" if ended else None
        return Event(self.id, tokens, log_probs[: len(tokens)], text, finish)


class Scheduler:
    """Answers requests in a fixed number of slots, each with caches of constant size.

    A prompt is read chunk by chunk between blocks of decode steps, and enters the running batch at the next block. All
    of it happens in `advance`, in the thread that calls it. How a request is answered does not depend on the others.

    Args:
      model: the language model.
      slots: how many requests are decoded together.
      max_len: the most tokens of a prompt with its continuation.
      prefix_cache: where states of prompts are kept and found.
      tokenizer: makes text of tokens; stop strings need it.
      block_tokens: drawn for each request by one `advance`, at most.
      chunk_tokens: of a prompt that are read by one `advance`, at most.

    Raises:
      UserError: a number is below 1, or the model does not read `max_len` tokens.
    """

    def __init__(
        self,
        model: LM | Decoder,
        *,
        slots: int,
        max_len: int,
        prefix_cache: States | None = None,
        tokenizer: Tokenizer | None = None,
        block_tokens: int = 16,
        chunk_tokens: int = CHUNK_TOKENS,
    ):
        for name, value in (("slots", slots), ("block_tokens", block_tokens), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise UserError(f"{name} is {value}; it is at least 1.")
        self.decoder = Decoder.of(model)
        if max_len < 2 or max_len > (self.decoder.max_len or max_len):
            raise UserError(
                f"max_len is {max_len}; it is at least 2 and at most the {self.decoder.max_len} of the model."
            )
        self.max_len, self.tokenizer, self.prefix_cache = max_len, tokenizer, prefix_cache
        self._block_tokens, self._chunk_tokens = block_tokens, chunk_tokens
        self._ids = itertools.count()
        self._waiting: collections.deque[Task] = collections.deque()
        self._slots: list[Task | None] = [None] * slots
        self._rows = Rows.stopped(self.decoder, slots, max_len)

    @property
    def busy(self) -> bool:
        """Whether a request is not finished."""
        return bool(self._waiting) or any(self._slots)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(task is not None for task in self._slots)

    def submit(self, request: Request) -> int:
        """Queue a request and return its id; UserError if it cannot be answered."""
        request = request.checked(self.decoder.config, self.max_len)
        if request.stop_strings and self.tokenizer is None:
            raise UserError("stop_strings are found in text, and there is no tokenizer; give the scheduler one.")
        text = None if self.tokenizer is None else TextStream(self.tokenizer, request.stop_strings)
        task = Task(next(self._ids), request, text)
        self._waiting.append(task)
        return task.id

    def cancel(self, id: int) -> bool:
        """Drop a request, of which no event comes any more; return whether there was one."""
        for task in self._waiting:
            if task.id == id:
                self._waiting.remove(task)
                return True
        for slot, task in enumerate(self._slots):
            if task is not None and task.id == id:
                self._free(slot)
                return True
        return False

    def advance(self) -> list[Event]:
        """Read a chunk of the next prompt, if a slot is free for it, and draw a block for all that have one."""
        if self._waiting and None in self._slots:
            self._read(self._waiting[0])
        if not any(self._slots):
            return []
        self._rows, block = decode(self.decoder, self._rows, self._block_tokens)
        return list(self._events(jax.device_get(block)))

    def _read(self, task: Task) -> None:
        if task.caches is None:
            self._begin(task)
        if (chunk := next(task.chunks, None)) is not None:
            task.caches = prefill_chunk(self.decoder, task.caches, chunk)
            task.read = min(task.read + self._chunk_tokens, len(task.request.prompt) - 1)
            self._keep(task)
        if task.read == len(task.request.prompt) - 1:
            self._enter(self._waiting.popleft())

    def _begin(self, task: Task) -> None:
        ids = task.request.prompt[:-1]
        if self.prefix_cache is not None:
            kept, task.read, _ = self.prefix_cache.lookup(ids)
            task.caches = None if kept is None else _copied(kept)
        if task.caches is None:
            task.caches = self.decoder.init_cache(1, self.max_len)
        task.chunks = chunks([ids[task.read :]], self._chunk_tokens)

    def _keep(self, task: Task) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.keep(task.request.prompt[: task.read], _copied(task.caches))

    def _enter(self, task: Task) -> None:
        slot = self._slots.index(None)
        self._rows = self._rows.with_row(slot, Rows.of(task.caches, [task.request]))
        self._slots[slot], task.caches = task, None

    def _free(self, slot: int) -> None:
        self._slots[slot] = None
        self._rows = self._rows.without_row(slot)

    def _events(self, block: Block) -> Iterator[Event]:
        for slot, task in enumerate(self._slots):
            if task is None:
                continue
            count = block.count[slot]
            event = task.event(block.tokens[slot, :count].tolist(), block.log_probs[slot, :count].tolist())
            if event.finish:
                self._free(slot)
            if event.tokens or event.text or event.finish:
                yield event


def _copied(caches: Caches) -> Caches:
    return jax.tree.map(jnp.copy, caches)

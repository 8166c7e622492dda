"""Requests that come and go, answered together in a fixed number of slots."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.generate.decoder import Decoder
from based_jax.generate.prefill import (
    CHUNK_TOKENS,
    FEWEST_TOKENS,
    Chunk,
    chunk_length,
    chunk_of,
    each_kind_of_chunk,
    prefill_chunk,
)
from based_jax.generate.prefix_cache import PrefixCache
from based_jax.generate.prompts import is_integer, shown
from based_jax.generate.requests import Request, checked_request
from based_jax.generate.rows import Block, Rows, decode
from based_jax.generate.state_layout import StateLayout
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


@dataclasses.dataclass(eq=False)
class Task:
    """A request on its way.

    Attributes:
      ends: where the pieces end in which its prompt is still to be read; None before the first.
      read: tokens of its prompt that its caches have read.
      caches: of one row, until it has its slot.
      text: what its tokens say.
      drawn: tokens that it has had.
    """

    id: int
    request: Request
    text: TextStream | None
    ends: Iterator[int] | None = None
    read: int = 0
    caches: Any = None
    drawn: int = 0

    def event(self, tokens: list[int], log_probs: list[float]) -> Event:
        """Return what newly drawn tokens are of the answer."""
        self.drawn += len(tokens)
        stopped = bool(tokens) and tokens[-1] in self.request.stop_ids
        tokens = tokens[:-1] if stopped else tokens
        text, kept = self._told(tokens)
        ended = stopped or self.drawn == self.request.max_new_tokens
        if self.text is not None and ended:
            text += self.text.finish()
        stopped |= self.text is not None and self.text.stopped
        finish = "stop" if stopped else "length" if ended else None
        return Event(self.id, tokens[:kept], log_probs[:kept], text, finish)

    def _told(self, tokens: list[int]) -> tuple[str, int]:
        """Return new text, and how many of the tokens it is of: those behind a stop string are none of the answer."""
        if self.text is None:
            return "", len(tokens)
        if not self.request.stop_strings:
            return self.text.push(*tokens), len(tokens)
        text = ""
        for number, token in enumerate(tokens, 1):
            text += self.text.push(token)
            if self.text.stopped:
                return text, number
        return text, len(tokens)


class Begun(NamedTuple):
    """A block that the device may still be at, and who had the slots when it was begun."""

    block: Block
    tasks: tuple[Task | None, ...]


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
      chunk_tokens: of a prompt that are read at once, at most.
      prompt_tokens: of prompts that are read by one `advance`, at most, by default a chunk's: more fill the slots
        sooner, and let those that have one wait longer.

    Raises:
      UserError: a number is below 1, or the model does not read `max_len` tokens.
    """

    def __init__(
        self,
        model: LM | Decoder,
        *,
        slots: int,
        max_len: int,
        prefix_cache: PrefixCache | None = None,
        tokenizer: Tokenizer | None = None,
        block_tokens: int = 16,
        chunk_tokens: int = CHUNK_TOKENS,
        prompt_tokens: int | None = None,
    ):
        counts = {
            "slots": slots,
            "block_tokens": block_tokens,
            "chunk_tokens": chunk_tokens,
            "prompt_tokens": prompt_tokens,
        }
        for name, value in counts.items():
            if value is not None and not (is_integer(value) and value >= 1):
                raise UserError(f"{name} is {shown(value)}; it is at least 1.")
        self.decoder = Decoder.of(model)
        most = self.decoder.max_len
        if not is_integer(max_len) or max_len < 2 or max_len > (most or max_len):
            bound = "" if most is None else f" and at most the {most} of the model"
            raise UserError(f"max_len is {shown(max_len)}; it is at least 2{bound}.")
        self.max_len, self.tokenizer = max_len, tokenizer
        self.prefix_cache = None if self.decoder.prefix_length else prefix_cache  # a prefix is of its whole prompt
        self._layout = StateLayout(self.decoder)
        self._block_tokens, self._chunk_tokens = block_tokens, chunk_length(self.decoder, chunk_tokens)
        self._prompt_tokens = prompt_tokens or self._chunk_tokens
        self._ids = itertools.count()
        self._waiting: collections.deque[Task] = collections.deque()
        self._slots: list[Task | None] = [None] * slots
        self._rows = Rows.stopped(self.decoder, slots, max_len)
        self._begun: Begun | None = None

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

    def compile(self) -> None:
        """Compile what requests run, before the first one waits for it."""

        def read(chunk: Chunk) -> None:
            prefill_chunk(self.decoder, self.decoder.init_cache(1, self.max_len), chunk)

        with ThreadPoolExecutor() as threads:
            list(threads.map(read, each_kind_of_chunk(self.max_len - 2, self._chunk_tokens)))
        if self.prefix_cache is not None:
            self._layout.fork(self._layout.take(self.decoder.init_cache(1, self.max_len), 0), self.max_len)
        self.submit(Request([0] * (self.decoder.prefix_length + 1), 1))
        while self.busy:
            self.advance()

    def submit(self, request: Request) -> int:
        """Queue a request and return its id; UserError if it cannot be answered."""
        request = checked_request(request).checked(self.decoder, self.max_len)
        if request.stop_strings and self.tokenizer is None:
            raise UserError("stop_strings are found in text, and there is no tokenizer; give the scheduler one.")
        if request.state is not None:
            self._layout.check(request.state, self.max_len)
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
        for slot, running in enumerate(self._slots):
            if running is not None and running.id == id:
                self._free(slot)
                return True
        return False

    def advance(self) -> list[Event]:
        """Read on in the next prompts, `prompt_tokens` at most, and begin a block for all that have a slot.

        The events are those of the block that was begun before, so that the device does not wait for who reads them.
        """
        self._read_prompts()
        before, self._begun = self._begun, None
        if any(self._slots):
            self._rows, block = decode(self.decoder, self._rows, self._block_tokens)
            self._begun = Begun(block, tuple(self._slots))
        return [] if before is None else list(self._events(before))

    def _read_prompts(self) -> None:
        left = self._prompt_tokens
        while left > 0 and self._waiting and None in self._slots:
            left -= max(self._read(self._waiting[0]), FEWEST_TOKENS)

    def _read(self, task: Task) -> int:
        """Read a prompt to the end of its next piece, where its state is kept; return the tokens of the piece."""
        if task.ends is None:
            task.ends = iter(self._begin(task))
        ids, before = np.asarray(task.request.prompt[:-1]), task.read
        if (end := next(task.ends, None)) is not None:
            chunk = chunk_of([ids[before:end]], self._chunk_tokens)
            task.caches, task.read = prefill_chunk(self.decoder, task.caches, chunk), end
            if self.prefix_cache is not None and task.request.state is None:
                self.prefix_cache.keep(ids[:end], self._layout.take(task.caches, end))
        if task.read == len(ids):
            self._enter(self._waiting.popleft())
        return task.read - before

    def _begin(self, task: Task) -> list[int]:
        """Give a request the caches that its prompt begins with; return where the pieces of what is to be read end."""
        ids, state = np.asarray(task.request.prompt[:-1]), task.request.state
        marks: Sequence[int] = ()
        if state is None and self.prefix_cache is not None:
            state, marks, _ = self.prefix_cache.lookup(ids, self.decoder.fingerprint)
            task.read = 0 if state is None else state.length
        if state is None:
            task.caches = self.decoder.init_cache(1, self.max_len)
        else:
            task.caches = self._layout.fork(state, self.max_len)
        return piece_ends(task.read, len(ids), self._chunk_tokens, marks)

    def _enter(self, task: Task) -> None:
        slot = self._slots.index(None)
        self._rows = self._rows.with_row(slot, Rows.of(task.caches, [task.request]))
        self._slots[slot], task.caches = task, None

    def _free(self, slot: int) -> None:
        self._slots[slot] = None
        self._rows = self._rows.without_row(slot)

    def _events(self, begun: Begun) -> Iterator[Event]:
        block = jax.device_get(begun.block)
        for slot, task in enumerate(begun.tasks):
            if task is None or self._slots[slot] is not task:  # it has ended since
                continue
            new = slice(block.drawn[slot])
            event = task.event(block.tokens[slot, new].tolist(), block.log_probs[slot, new].tolist())
            if event.finish:
                self._free(slot)
            if event.tokens or event.text or event.finish:
                yield event


def piece_ends(start: int, stop: int, chunk_tokens: int, marks: Iterable[int] = ()) -> list[int]:
    """Return where the pieces end that are read from `start` to `stop`: at multiples of a chunk, and at the marks."""
    chunks = range(start - start % chunk_tokens + chunk_tokens, stop, chunk_tokens)
    return sorted({*chunks, *marks, stop} - {start})

"""Requests that come and go, answered together in a fixed number of slots."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.generate.blocks import Block, compile_block, decode
from based_jax.generate.decoder import Caches, Decoder
from based_jax.generate.drafts import Drafts, check_drafts
from based_jax.generate.intake import Intake
from based_jax.generate.prefill import CHUNK_TOKENS, chunk_length
from based_jax.generate.prefix_cache import PrefixCache
from based_jax.generate.prompts import is_integer, shown
from based_jax.generate.requests import Request, checked_request
from based_jax.generate.rows import Rows
from based_jax.generate.state import State
from based_jax.generate.state_layout import StateLayout
from based_jax.generate.task import Event, Task, Work
from based_jax.generate.text import TextStream
from based_jax.nn.lm import LM

CHUNKS_BETWEEN_BLOCKS = 4
FIRST_TOKENS = 1
"""Of the block that begins with new requests, so that they have not long to wait for their first token."""
NO_REQUEST = Request([0])
"""In rows that a program has and no request needs."""


class Begun(NamedTuple):
    """A block that the device may still be at, and who had the slots when it was begun."""

    block: Block
    tasks: tuple[Task | None, ...]


class Scheduler:
    """Answers requests in a fixed number of slots, each with caches of constant size.

    Prompts are read chunk by chunk between blocks of decode steps, several in one program where they are short, and
    enter the running batch at the next block. All of it happens in `advance`, in the thread that calls it. How a
    request is answered does not depend on the others.

    Args:
      model: the language model.
      slots: how many requests are decoded together.
      max_len: the most tokens of a prompt with its continuation.
      prefix_cache: where states of prompts are kept and found. What others have left there decides where the pieces of
        a prompt end, and so how its state is rounded.
      tokenizer: makes text of tokens; stop strings need it.
      block_tokens: steps of each request in one `advance`, at most, beside the first ones of others.
      chunk_tokens: of prompts that one program reads, with their padding, at most.
      prompt_tokens: after which no further program of one `advance` begins to read, by default those of four: more fill
        the slots sooner, and let those that have one wait longer.
      drafts: tokens that are drafted for the model to verify: a step draws more than one where they prove right.

    Raises:
      UserError: a number is below 1, the model does not read `max_len` tokens, or the drafts are not for it.
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
        drafts: Drafts | None = None,
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
        check_drafts(drafts, self.decoder, max_len)
        self.max_len, self.tokenizer, self.drafts = max_len, tokenizer, drafts
        self.prefix_cache = None if self.decoder.prefix_length else prefix_cache  # a prefix is of its whole prompt
        self._layout = StateLayout(self.decoder)
        chunk_tokens = chunk_length(self.decoder, chunk_tokens)
        self._block_tokens, self._prompt_tokens = block_tokens, prompt_tokens or CHUNKS_BETWEEN_BLOCKS * chunk_tokens
        self._intake = Intake(self._layout, max_len, chunk_tokens, slots, self.prefix_cache)
        self._ids = itertools.count()
        self._waiting: collections.deque[Task] = collections.deque()
        self._slots: list[Task | None] = [None] * slots
        self._rows = Rows.stopped(self.decoder, slots, max_len, drafts)
        self._begun: Begun | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is not finished."""
        return self.waiting > 0 or any(self._slots)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting) + len(self._intake)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(task is not None for task in self._slots)

    def compile(self) -> None:
        """Compile what requests run, before the first one waits for it."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda compiles: compiles(), self.programs()))
        self.rehearse()
        while self.busy:
            self.advance()

    def programs(self) -> list[Callable[[], object]]:
        """Return what compiles a program each, that of all requests first; what is short is left to `rehearse`.

        Any thread may call them, beside `advance` too: who needs a program that another thread compiles waits for it.
        """
        programs: list[Callable[[], object]] = []
        if self.decoder.mesh is None:  # over several devices rows lie as the program before has left them
            rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._rows)
            programs += [functools.partial(compile_block, self.decoder, rows, self._block_tokens, self.drafts)]
        programs += self._intake.programs()
        if self.prefix_cache is not None:
            programs += [lambda: self.decoder.fingerprint]
        if self.drafts is not None:
            programs += [functools.partial(self.drafts.compile, self._intake.rows, self.max_len)]
        return programs

    def rehearse(self) -> int:
        """Go on from a state, in no slot, and queue a request, whose id is returned: the rest is compiled for these."""
        self._intake.rehearse()
        if self.prefix_cache is not None:
            self._go_on(len(self._slots), self._layout.take(self._intake.caches, 0), NO_REQUEST)
            self._rows = self._rows.without_row(len(self._slots))
        return self.submit(Request([0] * (self.decoder.prefix_length + 1), 1))

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
        return self._intake.remove(id)

    def advance(self) -> list[Event]:
        """Read on in the next prompts, `prompt_tokens` at most, and begin a block for all that have a slot.

        The events are those of the block that was begun before, so that the device does not wait for who reads them,
        and the first tokens of what has a slot since then.
        """
        begun = [] if self._begun is None else [self._begun]
        if self._read_prompts():
            begun.append(self._begin_block(FIRST_TOKENS))
        self._begun = self._begin_block(self._block_tokens) if any(self._slots) else None
        return [event for one in begun for event in self._events(one)]

    def _begin_block(self, most: int) -> Begun:
        self._rows, block = decode(self.decoder, self._rows, self._block_tokens, most, self.drafts)
        return Begun(block, tuple(self._slots))

    def _read_prompts(self) -> bool:
        """Read on; return whether a prompt has come to its end."""
        left, has_any_entered = self._prompt_tokens, False
        while left > 0:
            self._admit()
            read, has_entered = self._intake.read(), self._enter()
            if not (read or has_entered):
                break
            left, has_any_entered = left - read, has_any_entered or has_entered
        return has_any_entered

    def _admit(self) -> None:
        while self._waiting and len(self._intake) < self._slots.count(None) and self._intake.admit(self._waiting[0]):
            self._waiting.popleft()

    def _enter(self) -> bool:
        """Give slots to the prompts that have been read; return whether there is any."""
        read, count = self._intake.leave(), len(self._slots)
        slots, requests = count + np.arange(self._intake.rows, dtype=np.int32), [NO_REQUEST] * self._intake.rows
        for row, task in read.items():
            slot = self._slots.index(None)
            self._slots[slot] = task
            if task.state is None:
                slots[row], requests[row] = slot, task.request
            else:
                self._go_on(slot, task.state, task.request)
                task.state = None
        if (slots < count).any():
            self._rows = self._rows.with_rows(slots, self._begun_rows(self._intake.caches, requests))
        return bool(read)

    def _go_on(self, slot: int, state: State, request: Request) -> None:
        """Have a slot go on from a state: nothing is left to read of its prompt."""
        others = [NO_REQUEST] * (self._intake.rows - 1)
        self._rows = self._rows.with_state(slot, state, self._begun_rows((), [request, *others]))

    def _begun_rows(self, caches: Caches, requests: Sequence[Request]) -> Rows:
        drafting = None if self.drafts is None else self.drafts.begun(requests, self.max_len)
        return Rows.of(caches, requests, drafting)

    def _free(self, slot: int) -> None:
        task, self._slots[slot] = self._slots[slot], None
        if task is not None and not task.has_ended:
            self._rows = self._rows.without_row(slot)

    def _events(self, begun: Begun) -> Iterator[Event]:
        block = jax.device_get(begun.block)
        for slot, task in enumerate(begun.tasks):
            if task is None or self._slots[slot] is not task:  # it has ended since
                continue
            new = slice(block.drawn[slot])
            top = block.top_tokens[slot, new], block.top_log_probs[slot, new]
            drawn = block.tokens[slot, new].tolist(), block.log_probs[slot, new].tolist()
            event = task.event(*drawn, _likeliest(task, *top), Work.of(block, slot))
            if event.finish:
                self._free(slot)
            if event.tokens or event.text or event.finish:
                yield event


def _likeliest(task: Task, tokens: np.ndarray, log_probs: np.ndarray) -> list[dict[int, float]]:
    """Return the likeliest tokens at each place that a request asks for, none where it does not."""
    if not (count := task.request.top_log_probs):
        return []
    places = zip(tokens[:, :count].tolist(), log_probs[:, :count].tolist(), strict=True)
    # Where the vocabulary has fewer, token 0 stands again in place of more, at -inf.
    return [{token: x for token, x in zip(*place, strict=True) if x > -math.inf} for place in places]

"""Prompts that are being read, several in one program, until they have a slot to go on in."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from based_jax.dims import Unbroken
from based_jax.generate.decoder import Caches, Layout, Params, compile_ahead
from based_jax.generate.prefill import padded, padded_length
from based_jax.generate.prefix_cache import BLOCK_TOKENS, PrefixCache
from based_jax.generate.state_layout import StateLayout
from based_jax.generate.task import Task

MOST_ROWS = 8
"""Prompts that are read at once: so many of the shortest chunk are one of the longest."""
MOST_BYTES = 2**31
"""Of the caches of all of them, unless a single one has more."""


class ChunkShape(NamedTuple):
    """The shape of what one program reads: prompts, and tokens of each."""

    rows: int
    tokens: int


class Intake:
    """Reads prompts piece by piece, each in a row of its own, and several of similar length at once.

    How many rows a program has depends on the length of the piece alone, not on how many of them read, and those that
    begin stand apart from those that go on, since attention reads an empty cache in a way of its own: a prompt is read
    bitwise alike alone and in any company. A row that has nothing to read is left as it is.

    Args:
      layout: of the model's states.
      max_len: the room of the caches.
      chunk_tokens: that are read at once, at most.
      slots: prompts that may go on at once; more need not be read.
      prefix_cache: where states of prompts are kept and found.
    """

    def __init__(
        self, layout: StateLayout, max_len: int, chunk_tokens: int, slots: int, prefix_cache: PrefixCache | None
    ):
        self.decoder, self.prefix_cache = layout.decoder, prefix_cache
        most = min(MOST_ROWS, slots, MOST_BYTES // self.decoder.state_bytes(max_len))
        self.rows = max(1, most) if self.decoder.rows_are_apart else 1
        self.caches = self.decoder.init_cache(self.rows, max_len)
        self._layout, self._max_len, self._chunk_tokens = layout, max_len, chunk_tokens
        self._tasks: dict[int, Task] = {}  # by row, the oldest first

    def __len__(self) -> int:
        """Return how many prompts are being read."""
        return len(self._tasks)

    def programs(self) -> list[Callable[[], object]]:
        """Return what compiles a program for prompts each; any thread may call them, with caches of their own."""

        def read(length: int) -> None:
            caches = self.decoder.init_cache(self.rows, self._max_len)
            arguments = self._arguments(caches, self._shape(length), {0: np.zeros(length, np.int32)}, True)
            with self.decoder.running():
                compile_ahead(_read, *arguments)

        lengths = range(1 + min(self._max_len - 2, self._chunk_tokens))
        kinds = {(self._shape(length), length == self._chunk_tokens): length for length in lengths}
        return [functools.partial(read, length) for length in kinds.values()]

    def rehearse(self) -> None:
        """Run what keeps a state and goes on from it, which changes nothing."""
        if self.prefix_cache is not None:
            self.caches = self._layout.put(self.caches, 0, self._layout.take(self.caches, 0))

    def admit(self, task: Task) -> bool:
        """Give a prompt a row, and what it goes on from; return whether it has one.

        It has none where all are in use, or another prompt is about to leave more of what both begin with.
        """
        if len(self._tasks) == self.rows or self._is_worth_waiting(task):
            return False
        row = next(row for row in range(self.rows) if row not in self._tasks)
        ids, state, marks = task.to_read, task.request.state, tuple[int, ...]()
        if (cache := self._cache_for(task)) is not None:
            state, marks, _ = cache.lookup(ids, self.decoder.fingerprint)
            task.read = 0 if state is None else state.length
        task.ends, task.has_begun = piece_ends(task.read, len(ids), self._chunk_tokens, marks), state is not None
        if state is not None and task.ends:
            self.caches = self._layout.put(self.caches, row, state)
        task.state = None if task.ends else state
        self._tasks[row] = task
        return True

    def _cache_for(self, task: Task) -> PrefixCache | None:
        """Return where states of a prompt are kept, none where it goes on from one of its own."""
        return self.prefix_cache if task.request.state is None else None

    def _is_worth_waiting(self, task: Task) -> bool:
        """Return whether a state will be kept that is a longer prefix of a prompt than those that are."""
        others = [other for other in self._tasks.values() if other.ends and self._cache_for(other)]
        if not others or (cache := self._cache_for(task)) is None:
            return False
        ids = task.to_read
        covered = max(cache.covered(ids, self.decoder.fingerprint), BLOCK_TOKENS - 1)
        shared = [(other, number_shared(ids, other.to_read)) for other in others]
        return any(covered < end <= number for other, number in shared for end in other.ends)

    def remove(self, id: int) -> bool:
        """Take out the prompt of a task; return whether it was there."""
        rows = [row for row, task in self._tasks.items() if task.id == id]
        for row in rows:
            del self._tasks[row]
        return bool(rows)

    def read(self) -> int:
        """Read a piece of the oldest prompt that is not all read, and of others whose piece has its shape.

        Their states are kept. Returns the tokens that the program reads, with padding; 0 where nothing is to be read.
        """
        unread = {row: task for row, task in self._tasks.items() if not task.is_read}
        kinds = {row: (self._shape(task.next_end - task.read), not task.has_begun) for row, task in unread.items()}
        if not kinds:
            return 0
        shape, are_new = next(iter(kinds.values()))
        tasks = {row: unread[row] for row, kind in kinds.items() if kind == (shape, are_new)}
        tasks = dict(itertools.islice(tasks.items(), shape.rows))
        parts = {row: task.to_read[task.read : task.next_end] for row, task in tasks.items()}
        self.caches = self._run(self.caches, shape, parts, are_new)
        for row, task in tasks.items():
            self._have_read(row, task)
        return shape.rows * shape.tokens

    def _have_read(self, row: int, task: Task) -> None:
        task.read, task.ends, task.has_begun = task.next_end, task.ends[1:], True
        if (cache := self._cache_for(task)) is not None:
            cache.keep(task.to_read[: task.read], self._layout.take(self.caches, task.read, row=row))

    def leave(self) -> dict[int, Task]:
        """Take out the prompts that have been read; return them by their rows, which stay as they are until then."""
        read = {row: task for row, task in self._tasks.items() if task.is_read}
        for row in read:
            del self._tasks[row]
        return read

    def _shape(self, length: int) -> ChunkShape:
        """Return the shape of the program that reads a piece of a length."""
        tokens = padded_length(length, self._chunk_tokens)
        return ChunkShape(min(self.rows, max(1, self._chunk_tokens // tokens)), tokens)

    def _run(self, caches: Caches, shape: ChunkShape, parts: Mapping[int, np.ndarray], are_new: bool) -> Caches:
        """Return the caches after the next tokens of some rows, which are all new or none; those given are used up."""
        with self.decoder.running():
            return _read(*self._arguments(caches, shape, parts, are_new))

    def _arguments(self, caches: Caches, shape: ChunkShape, parts: Mapping[int, np.ndarray], are_new: bool) -> tuple:
        """Return what the program is called with that reads on in some rows."""
        spare = shape.rows - len(parts)
        rows = [*parts, *range(self.rows, self.rows + spare)]  # there is none beyond the last
        ids, segment_ids = padded([*parts.values(), *[np.zeros(0, np.int32)] * spare], shape.tokens)
        is_whole = shape.tokens == self._chunk_tokens and bool(segment_ids.all())
        chunk = ids, None if is_whole else segment_ids
        layout, params = self.decoder.layout, self.decoder.params
        return layout, self._max_len, params, caches, np.asarray(rows, np.int32), np.bool_(are_new), *chunk


def number_shared(one: np.ndarray, two: np.ndarray) -> int:
    """Return how many tokens two prompts begin with alike."""
    both = min(len(one), len(two))
    differ = np.flatnonzero(one[:both] != two[:both])
    return int(differ[0]) if len(differ) else both


def piece_ends(start: int, stop: int, chunk_tokens: int, marks: Iterable[int] = ()) -> list[int]:
    """Return where the pieces end that are read from `start` to `stop`: at multiples of a chunk, and at the marks."""
    chunks = range(start - start % chunk_tokens + chunk_tokens, stop, chunk_tokens)
    return sorted({*chunks, *marks, stop} - {start})


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _read(
    layout: Layout,
    max_len: int,
    params: Params,
    caches: Caches,
    rows: Int[Array, "r"],
    are_new: Bool[Array, ""],
    ids: Int[Array, "r T"],
    segment_ids: Int[Array, "r T"] | None,
) -> Caches:
    """Return the caches of B rows after some have read a chunk, from nothing on if new; rows beyond B are padding."""
    model = layout.model(params)
    old, empty = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), caches), model.init_cache(len(rows), max_len)
    begun = jax.tree.map(lambda x, y: jnp.where(are_new, x, y), empty, old)
    _, read = model.prefill(ids, begun, segment_ids if segment_ids is None else Unbroken(segment_ids))
    return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop", unique_indices=True), caches, read)

"""States of prompts that were read, found again by what the next prompt begins with."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from based_jax.errors import UserError
from based_jax.generate.prompts import is_number, shown
from based_jax.generate.state import State

BLOCK_TOKENS = 16
"""The shortest prefix that is found again, and what the places where prompts part are multiples of."""
BLOCK_BYTES = BLOCK_TOKENS * np.dtype(np.int32).itemsize
MOST_LOST = 4096
"""First blocks of which it is known why they have no state any more."""

TOO_SHORT, NEVER_SEEN, NOT_KEPT = "too short", "never seen", "not kept"
EVICTED, TOO_LARGE, OTHER_MODEL = "evicted", "too large", "other model"
REASONS = (TOO_SHORT, NEVER_SEEN, NOT_KEPT, EVICTED, TOO_LARGE, OTHER_MODEL)
"""Why nothing of a prompt was restored: it has fewer than 16 tokens; none began like it; one did, and its states stand
behind the place where they part; they gave way to others, or were larger than the budget; they are of another model."""


class Found(NamedTuple):
    """What is known of a prompt.

    Attributes:
      state: the longest kept one that is a prefix of it, or None.
      marks: numbers of tokens, beyond the state's, after which a state should be kept while the rest is read.
      miss: one of `REASONS` where there is no state.
    """

    state: State | None
    marks: tuple[int, ...]
    miss: str | None


@dataclasses.dataclass
class Metrics:
    """What a cache has been asked and has done since it was made; `states` and `bytes` are what it holds."""

    lookups: int = 0
    hits: int = 0
    tokens_asked: int = 0
    tokens_restored: int = 0
    kept: int = 0
    evicted: int = 0
    states: int = 0
    bytes: int = 0
    misses: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))


@dataclasses.dataclass(eq=False, slots=True)
class _Node:
    """A block of tokens behind those of its parent; the root has none. States end inside of the block after it."""

    model: str
    parent: "_Node | None" = None
    block: bytes = b""
    children: "dict[bytes, _Node]" = dataclasses.field(default_factory=dict)
    states: dict[bytes, State] = dataclasses.field(default_factory=dict)


class PrefixCache:
    """States of prompts within a budget of bytes: the least recently used ones give way.

    A recurrent state holds all of its tokens and cannot be cut to fewer, so that what matters is where prompts stop to
    be kept. Who reads a prompt keeps a state

    - after its first 16 tokens, if they are new: any prefix of 16 tokens or more that two prompts share is found;
    - after each chunk, and at its end: the next prompt reads less than a chunk of what it shares again, or nothing
      where it goes on from all of it;
    - where it parts from a prompt that was read before, to a multiple of 16 tokens, since prompts that part at one
      place do so again: the third reads none of what it shares (arXiv 2411.19379 keeps states at such places too).

    A hit restores, bitwise, the longest kept state that is a prefix; the rest is read again. Of 37 tokens shared with
    a prompt of 4,000 the second prompt has 16 restored, and from the third on it is 32.

    Prompts are found by their tokens, not by a hash of them. States that keep every token, those of attention, could
    be cut; here each holds its own copy.

    Args:
      byte_budget: of all states together.

    Raises:
      UserError: the budget is below 1.
    """

    def __init__(self, byte_budget: int):
        if not is_number(byte_budget) or byte_budget < 1:
            raise UserError(f"The budget of a prefix cache is {shown(byte_budget)} bytes; it is at least 1.")
        self.byte_budget, self.metrics = byte_budget, Metrics()
        self._roots: dict[str, _Node] = {}
        self._by_use: collections.OrderedDict[tuple[_Node, bytes], int] = collections.OrderedDict()
        self._lost: collections.OrderedDict[tuple[str, bytes], str] = collections.OrderedDict()

    def lookup(self, ids: Int[np.ndarray, "_"], model: str) -> Found:
        """Return what is known of a prompt, of the model with this fingerprint."""
        ids = np.ascontiguousarray(ids, np.int32)
        path = list(self._path(ids, model))
        state = self._longest(path, ids)
        covered = 0 if state is None else state.length
        miss = self._reason(ids, model, path) if state is None else None
        self._count(len(ids), covered, miss)
        shared = BLOCK_TOKENS * (len(path) - 1)
        marks = sorted({BLOCK_TOKENS, shared})
        return Found(state, tuple(mark for mark in marks if covered < mark < len(ids)), miss)

    def covered(self, ids: Int[np.ndarray, "_"], model: str) -> int:
        """Return how many of a prompt's tokens the state that `lookup` would find has read; nothing is counted."""
        ids = np.ascontiguousarray(ids, np.int32)
        state = self._longest(list(self._path(ids, model)), ids)
        return 0 if state is None else state.length

    def keep(self, ids: Int[np.ndarray, "_"], state: State) -> None:
        """Keep the state after these tokens, unless they are fewer than 16, or it is larger than the budget.

        Raises:
          UserError: the state has read another number of tokens.
        """
        ids = np.ascontiguousarray(ids, np.int32)
        if len(ids) != state.length:
            raise UserError(f"The state of {len(ids)} tokens has read {state.length}.")
        if len(ids) < BLOCK_TOKENS:
            return
        if state.nbytes > self.byte_budget:
            self._lose(state.model, ids[:BLOCK_TOKENS].tobytes(), TOO_LARGE)
            return
        node = self._grown(ids, state.model)
        self._put(node, ids[len(ids) // BLOCK_TOKENS * BLOCK_TOKENS :].tobytes(), state)
        while self.metrics.bytes > self.byte_budget:
            self._evict()

    def _path(self, ids: np.ndarray, model: str) -> Iterator[_Node]:
        """Yield the root of the model and the node of each block of the ids that a prompt with states has, in order."""
        node = self._roots.get(model, _Node(model))
        yield node
        for block in _blocks(ids):
            if (child := node.children.get(block)) is None:
                return
            node = child
            yield node

    def _longest(self, path: list[_Node], ids: np.ndarray) -> State | None:
        for depth in reversed(range(len(path))):
            rest = ids[depth * BLOCK_TOKENS :][:BLOCK_TOKENS].tobytes()
            for tail in sorted(path[depth].states, key=len, reverse=True):
                if rest.startswith(tail):
                    self._by_use.move_to_end((path[depth], tail))
                    return path[depth].states[tail]
        return None

    def _reason(self, ids: np.ndarray, model: str, path: list[_Node]) -> str:
        if len(ids) < BLOCK_TOKENS:
            return TOO_SHORT
        first = ids[:BLOCK_TOKENS].tobytes()
        if (model, first) in self._lost:
            return self._lost[model, first]
        if len(path) > 1:
            return NOT_KEPT
        return OTHER_MODEL if any(first in root.children for root in self._roots.values()) else NEVER_SEEN

    def _count(self, asked: int, covered: int, miss: str | None) -> None:
        self.metrics.lookups += 1
        self.metrics.tokens_asked += asked
        self.metrics.tokens_restored += covered
        if miss is None:
            self.metrics.hits += 1
        else:
            self.metrics.misses[miss] += 1

    def _grown(self, ids: np.ndarray, model: str) -> _Node:
        """Return the node of the last whole block of the ids, made if it is new."""
        node = self._roots.setdefault(model, _Node(model))
        for block in _blocks(ids):
            node = node.children.setdefault(block, _Node(model, node, block))
        return node

    def _put(self, node: _Node, tail: bytes, state: State) -> None:
        if tail not in node.states:
            node.states[tail] = state
            self.metrics.kept += 1
            self.metrics.states += 1
            self.metrics.bytes += state.nbytes
            self._by_use[node, tail] = state.nbytes
        self._by_use.move_to_end((node, tail))

    def _evict(self) -> None:
        """Drop the state that was used longest ago, and the blocks that lead to no other."""
        (node, tail), nbytes = self._by_use.popitem(last=False)
        del node.states[tail]
        self.metrics.evicted += 1
        self.metrics.states -= 1
        self.metrics.bytes -= nbytes
        while node.parent is not None:
            first, empty = node.block, not (node.states or node.children)
            node = node.parent
            if empty:
                del node.children[first]
        self._lose(node.model, first, EVICTED)

    def _lose(self, model: str, first: bytes, reason: str) -> None:
        self._lost[model, first] = reason
        self._lost.move_to_end((model, first))
        if len(self._lost) > MOST_LOST:
            self._lost.popitem(last=False)


def _blocks(ids: np.ndarray) -> Iterator[bytes]:
    """Yield the whole blocks of ids in order."""
    content = ids.tobytes()
    for start in range(0, len(content) - BLOCK_BYTES + 1, BLOCK_BYTES):
        yield content[start : start + BLOCK_BYTES]

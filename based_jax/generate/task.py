"""A request on its way, and what is told of it."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from based_jax.generate.blocks import Block
from based_jax.generate.requests import Request
from based_jax.generate.state import State
from based_jax.generate.text import TextStream


class Work(NamedTuple):
    """What new tokens took.

    Attributes:
      steps: of the model, each of which draws a token, and as many more as of the drafted ones prove right.
      drawn: tokens, those that end the answer and are none of it among them.
      offered: drafted tokens.
    """

    steps: int = 0
    drawn: int = 0
    offered: int = 0

    @classmethod
    def of(cls, block: Block, row: int) -> "Work":
        """Return what a block took of a row."""
        return cls(int(block.steps[row]), int(block.drawn[row]), int(block.offered[row]))

    @property
    def accepted(self) -> int:
        """Drafted tokens that proved right."""
        return self.drawn - self.steps


NO_WORK = Work()


class Event(NamedTuple):
    """What is new of one request.

    Attributes:
      id: as `Scheduler.submit` gave it.
      tokens: new ids, without one that stops.
      log_probs: of the tokens, by the model's own distribution (temperature 1, nothing cut).
      text: new text, "" where there is no tokenizer; characters and stop strings that are not complete are held back.
      finish: None as long as the request goes on; "stop" at a stop id or string, "length" at `max_new_tokens`.
      top_log_probs: with each token the likeliest ones there and their log-probabilities, as many as are asked for.
      work: what drawing them took.
    """

    id: int
    tokens: list[int]
    log_probs: list[float]
    text: str = ""
    finish: str | None = None
    top_log_probs: Sequence[dict[int, float]] = ()
    work: Work = NO_WORK


@dataclasses.dataclass(eq=False)
class Task:
    """A request on its way.

    Attributes:
      text: what its tokens say.
      ends: where the pieces end in which its prompt is still to be read.
      read: tokens of its prompt that its caches have read.
      has_begun: whether its caches are its own, if only those of what it goes on from.
      state: of all that is to be read, where it was kept: its caches are then nowhere else.
      drawn: tokens that it has had.
      has_ended: whether its row has stopped by itself: at a stop id, or with its last token.
    """

    id: int
    request: Request
    text: TextStream | None
    ends: list[int] = dataclasses.field(default_factory=list)
    read: int = 0
    has_begun: bool = False
    state: State | None = None
    drawn: int = 0
    has_ended: bool = False

    @property
    def to_read(self) -> np.ndarray:
        """The tokens of the prompt that are read before the first one is drawn: all but the last."""
        return np.asarray(self.request.prompt[:-1])

    @property
    def is_read(self) -> bool:
        """Whether all of that has been read."""
        return self.has_begun and not self.ends

    @property
    def next_end(self) -> int:
        """Where its next piece ends."""
        return self.ends[0] if self.ends else self.read

    def event(
        self, tokens: list[int], log_probs: list[float], top: Sequence[dict[int, float]] = (), work: Work = NO_WORK
    ) -> Event:
        """Return what newly drawn tokens are of the answer, and what the likeliest ones beside them."""
        self.drawn += len(tokens)
        stopped = bool(tokens) and tokens[-1] in self.request.stop_ids
        tokens = tokens[:-1] if stopped else tokens
        text, kept = self._told(tokens)
        self.has_ended = stopped or self.drawn == self.request.max_new_tokens
        if self.text is not None and self.has_ended:
            text += self.text.finish()
        stopped |= self.text is not None and self.text.stopped
        finish = "stop" if stopped else "length" if self.has_ended else None
        return Event(self.id, tokens[:kept], log_probs[:kept], text, finish, top[:kept], work)

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

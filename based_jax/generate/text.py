"""Text of tokens as they come: no half character, and nothing of a stop string."""

from collections.abc import Sequence

from based_jax.data.tokenizer import Tokenizer

BROKEN = "\ufffd"
"""What a tokenizer makes of bytes that are no character, or not yet."""


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt; one of no text begins a document, at the end of another."""
    return tokenizer.encode(text) or [tokenizer.end_of_text]


class TextStream:
    """The text of one continuation.

    Characters of which bytes are missing are held back, and so is what a stop string may begin with.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._told: list[int] = []  # ids that `_fresh` go on from, since a tokenizer may read them together
        self._fresh: list[int] = []
        self._held = ""

    def push(self, *tokens: int) -> str:
        """Return what is certain of the text with some tokens more; `stopped` is set where a stop string ends it."""
        self._fresh.extend(tokens)
        before = self._tokenizer.decode(self._told)
        text = self._tokenizer.decode(self._told + self._fresh)[len(before) :]
        if text.endswith(BROKEN):
            return ""
        self._told, self._fresh = self._fresh, []
        return self._certain(self._held + text)

    def finish(self) -> str:
        """Return what was held back, at the end."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._told)
        rest = self._held + self._tokenizer.decode(self._told + self._fresh)[len(before) :]
        self._fresh, self._held = [], ""
        return self._until_stop(rest)

    def _certain(self, text: str) -> str:
        text = self._until_stop(text)
        held = 0 if self.stopped else max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _until_stop(self, text: str) -> str:
        places = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text a stop string may begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""Text of tokens as they come: no half character, and nothing of a stop string."""

from collections.abc import Sequence

from based_jax.data.tokenizer import Tokenizer

BROKEN = "\ufffd"
"""What a tokenizer makes of bytes that are no character, or not yet."""
LONGEST_BROKEN = 3
"""How many of them stand at most for bytes that more of them may make a character."""
CONTEXT_TOKENS = 2
"""Tokens that new ones are decoded behind, since a tokenizer may read them together."""


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt; one of no text begins a document, where nothing else does at the end of another."""
    return [*tokenizer.beginning, *tokenizer.encode(text)] or [tokenizer.end_of_text]


class TextStream:
    """The text of one continuation.

    Characters of which bytes are missing are held back, and so is what a stop string may begin with.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._ids: list[int] = []
        self._told = 0  # characters of their text that are not new any more
        self._held = ""

    def push(self, *tokens: int) -> str:
        """Return what is certain of the text with some tokens more; `stopped` is set where a stop string ends it."""
        self._ids.extend(tokens)
        text = self._tokenizer.decode(self._ids)
        whole = len(text) - _broken(text)
        new, self._told = text[self._told : whole], max(self._told, whole)
        if whole == len(text):
            self._ids = self._ids[-CONTEXT_TOKENS:]
            self._told = len(self._tokenizer.decode(self._ids))
        return self._certain(self._held + new)

    def finish(self) -> str:
        """Return what was held back, at the end."""
        if self.stopped:
            return ""
        rest = self._held + self._tokenizer.decode(self._ids)[self._told :]
        self._ids, self._told, self._held = [], 0, ""
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


def _broken(text: str) -> int:
    """Return how many characters at the end of a text more bytes may change."""
    return min(len(text) - len(text.rstrip(BROKEN)), LONGEST_BROKEN)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text a stop string may begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

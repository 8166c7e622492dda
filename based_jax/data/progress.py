"""Progress of long work on data: a bar on a terminal, a line now and then elsewhere, nothing for what is soon done."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """How much of an extent is read, with the tokens so far.

    Args:
      what: is done, such as "Packing 'my_texts'".
      extent: what `update` counts to.
      stream: where to print, standard output if None.
      patience: seconds before the first line, and between lines.
    """

    def __init__(self, what: str, extent: int, stream: TextIO | None = None, patience: float = SECONDS_BETWEEN_LINES):
        self._what, self._extent, self._patience = what, max(extent, 1), patience
        self._stream = stream or sys.stdout
        self._shown = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._bar = None
        if self._stream.isatty():
            shape = "{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]"
            self._bar = tqdm(total=self._extent, desc=what, file=self._stream, leave=False, bar_format=shape, delay=1)

    def update(self, position: int, tokens: int | None = None) -> None:
        """Tell how far the work is; time is counted from the first call, before which something else may be done."""
        counted = "" if tokens is None else f"{tokens:,} tokens"
        if self._first is None:
            self._begin(position)
        if self._bar is not None:
            self._bar.set_postfix_str(counted, refresh=False)
            self._bar.update(position - self._bar.n)
        elif (now := time.monotonic()) - self._shown >= self._patience:
            self._shown = now
            told = (f"{min(position / self._extent, 1.0):.0%}", counted, self._left(now, position))
            print(f"{self._what}: {', '.join(filter(None, told))}", file=self._stream, flush=True)

    def _begin(self, position: int) -> None:
        self._first = time.monotonic(), position
        if self._bar is not None:
            self._bar.start_t = self._first[0]

    def _left(self, now: float, position: int) -> str:
        """Return how long what is left takes at the speed so far, in words; nothing before there is any."""
        assert self._first is not None
        begin, first = self._first
        if position <= first:
            return ""
        return f"about {(now - begin) * max(self._extent - position, 0) / (position - first):.0f} s left"

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

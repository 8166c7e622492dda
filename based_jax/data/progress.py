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
        self._start = self._shown = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            shape = "{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]"
            self._bar = tqdm(total=self._extent, desc=what, file=self._stream, leave=False, bar_format=shape, delay=1)

    def update(self, position: int, tokens: int) -> None:
        """Tell how far the work is."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            self._bar.update(position - self._bar.n)
        elif (now := time.monotonic()) - self._shown >= self._patience:
            self._shown = now
            share = min(position / self._extent, 1.0)
            left = f", about {(now - self._start) * (1 / share - 1):.0f} s left" if share else ""
            print(f"{self._what}: {share:.0%}, {tokens:,} tokens{left}", file=self._stream, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

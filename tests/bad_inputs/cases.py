"""What a row of the tables is."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line that is refused.

    Attributes:
      name: of the case.
      words: of the command line; '<file>' stands for a file or folder of the fixture `files`, '<new>' for a folder that
        does not exist, '<tmp>' for the empty folder that the command runs in.
      sentence: part of what it prints; '<...>' as in `words`.
      prepare: what to make in '<tmp>' before.
    """

    name: str
    words: tuple[str, ...]
    sentence: str
    prepare: Callable[[Path], Any] = lambda folder: None


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the API that is refused.

    Attributes:
      name: of the case.
      call: takes an empty folder, which it is called in.
      sentence: part of the `UserError`.
    """

    name: str
    call: Callable[[Path], Any]
    sentence: str

"""What a server answers at most."""

import dataclasses

from based_jax.errors import UserError
from based_jax.generate.prompts import is_integer, shown

LEAST = {"queue": 0, "max_len": 2, "prefix_bytes": 0}
"""Of the limits that may not be 1, or may be less."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server answers and keeps at most; who asks for more is refused before it costs anything.

    Attributes:
      slots: texts that are written at once.
      queue: texts that wait for a slot.
      max_len: tokens of a prompt with its continuation.
      new_tokens: tokens of a continuation.
      body_bytes: of a request.
      prefix_bytes: of states kept of prompts, for those that begin alike; 0 keeps none.
    """

    slots: int = 8
    queue: int = 256
    max_len: int = 4096
    new_tokens: int = 4096
    body_bytes: int = 4 * 2**20
    prefix_bytes: int = 2**30

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            least = LEAST.get(name, 1)
            if not is_integer(value) or value < least:
                raise UserError(f"{name} is {shown(value)}; it is at least {least}.")

    def of_model(self, max_len: int | None) -> "Limits":
        """Return the limits of a model that reads so many tokens, or any number."""
        return self if max_len is None else dataclasses.replace(self, max_len=min(self.max_len, max_len))

    @property
    def texts(self) -> int:
        """The most texts that are written or wait."""
        return self.slots + self.queue

"""The one exception that a command turns into a sentence and exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message is one sentence that names the value and what is allowed."""


def unknown(what: str, name: str, allowed: Iterable[str]) -> UserError:
    """Return the error for `name` not being among `allowed`, with the nearest allowed name as a suggestion."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UserError(f"Unknown {what} '{name}': {hint}Allowed: {', '.join(allowed)}.")

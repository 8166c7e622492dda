"""The one exception that a command turns into a sentence and exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message is one sentence that names the value and what is allowed."""


def unknown(what: str, name: str, allowed: Iterable[str], meant: str | None = None) -> UserError:
    """Return the error for `name` not being among `allowed`, with what was `meant` or the nearest allowed name."""
    allowed = sorted(map(str, allowed))
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    if meant is None and near:
        meant = f"'{near[0]}'"
    hint = f"did you mean {meant}? " if meant else ""
    return UserError(f"Unknown {what} '{name}': {hint}Allowed: {', '.join(allowed)}.")


def installs(extra: str) -> str:
    """Return what brings the packages of an extra: this package is on no index, and is installed from its checkout."""
    return f"pip install -e '.[{extra}]' in the checkout"

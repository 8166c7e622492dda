"""Which code made a row of results."""

import functools
import subprocess
from pathlib import Path

NO_CODE = (":(top,exclude)experiments/*/results/*", ":(top,exclude)*.md")
"""Files that change while results are made, and that no result depends on."""


@functools.cache
def revision() -> str | None:
    """Return the git commit of this code, with "+" where files differ from it but `NO_CODE`; None outside a clone."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # a clone may have it installed, and not be of it
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *NO_CODE)
        return _git("rev-parse", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    folder = Path(__file__).parent
    return subprocess.check_output(["git", *words], cwd=folder, text=True, stderr=subprocess.DEVNULL).strip()

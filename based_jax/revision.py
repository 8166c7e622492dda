"""Which code made a row of results, and which command."""

import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path

REVISION_VARIABLE = "BASED_JAX_REVISION"
"""Says the commit of a copy that has no git, as in a container."""
NO_CODE = (":(top,exclude)experiments/*/results/*", ":(top,exclude)*.md")
"""Files that change while results are made, and that no result depends on."""


@functools.cache
def revision() -> str | None:
    """Return the git commit of this code, with "+" where files differ from it but `NO_CODE`.

    Outside a clone it is what $BASED_JAX_REVISION says, or None.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # a clone may have it installed, and not be of it
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *NO_CODE)
        return _git("rev-parse", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(REVISION_VARIABLE)


def command() -> str:
    """Return what a shell takes to run this process again: a module of `experiments`, or the package's command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else ""
    return shlex.join(["python", "-m", module if module.startswith("experiments.") else "based_jax", *sys.argv[1:]])


def _git(*words: str) -> str:
    folder = Path(__file__).parent
    return subprocess.check_output(["git", *words], cwd=folder, text=True, stderr=subprocess.DEVNULL).strip()

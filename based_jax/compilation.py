"""Compiled programs that are kept on the disk: the next process, on any host that sees the folder, need not compile.

JAX does the keeping: a program's name there says its text, versions, flags and devices. What reads them runs them, so
the folder is the user's own; its lock serves processes of several hosts.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from based_jax.errors import UserError
from based_jax.folders import local_path, make_folder

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "BASED_JAX_COMPILED"
NOWHERE = "none"
MAX_BYTES = 32 << 30
"""Of all programs; those go first that were not read for longest."""
SECONDS_VARIABLE, MIN_COMPILE_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0.2
"""What compiles sooner is not kept, unless JAX's variable says another time than these seconds."""
HIT_EVENT = "/jax/compilation_cache/cache_hits"


def kept_in() -> Path | None:
    """Return where this process keeps what it compiles; None where it keeps nothing yet, or nowhere."""
    given = jax.config.jax_compilation_cache_dir
    return Path(given) if given and jax.config.jax_enable_compilation_cache else None


def keep(given: str | None = None) -> Path | None:
    """Keep what this process and those that it starts compile, and return the folder; None where nothing is kept.

    Args:
      given: the folder, or "none"; without it $BASED_JAX_COMPILED says so, else it is the user's cache folder. What
        JAX's own $JAX_COMPILATION_CACHE_DIR or $JAX_ENABLE_COMPILATION_CACHE says stands.

    Raises:
      UserError: a folder that was named cannot be made.
    """
    if not jax.config.jax_enable_compilation_cache or kept_in() is not None:
        return kept_in()
    named = given or os.environ.get(FOLDER_VARIABLE)
    if named == NOWHERE:
        os.environ[FOLDER_VARIABLE] = NOWHERE
        return None
    folder = _default_folder() if named is None else local_path(named, "The folder of compiled programs")
    if folder is None or not _made(folder, must=named is not None):
        return None
    os.environ[FOLDER_VARIABLE] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    if SECONDS_VARIABLE not in os.environ:
        seconds = min(MIN_COMPILE_SECONDS, jax.config.jax_persistent_cache_min_compile_time_secs)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    return folder


def _default_folder() -> Path | None:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "based_jax" / "compiled"
    except RuntimeError:  # no home
        return None


def _made(folder: Path, must: bool) -> bool:
    """Return whether the folder is there, for nobody else to write into if it was made here."""
    try:
        if not folder.exists():
            make_folder(folder)
            folder.chmod(0o700)
    except (UserError, OSError):
        if must:
            raise
        return False
    return os.access(folder, os.W_OK)


class CacheHits:
    """How many programs were read while `counted_hits` was open."""

    count = 0


@contextlib.contextmanager
def counted_hits() -> Iterator[CacheHits]:
    """Count the programs that are read from the disk instead of compiled, in this process."""
    hits, counting = CacheHits(), True

    def listen(event: str, **_: object) -> None:
        hits.count += counting and event == HIT_EVENT

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        counting = False  # JAX has no public way to end a listener

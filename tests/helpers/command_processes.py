"""Commands in processes of their own, each forked off a server that has imported what they need but started no backend.

A process then begins in milliseconds, where an interpreter of its own takes seconds to import.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import jax

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["based_jax.train.loop", "based_jax.commands.train", "based_jax.data.text"])


class CommandProcess:
    """`python -m based_jax WORDS` on one device; what it prints, and what it compiled, stands in `folder`."""

    def __init__(self, words, folder: Path):
        self._out, self._error = folder / "out.txt", folder / "error.txt"
        settings = {
            "jax_num_cpu_devices": 1,
            "jax_compilation_cache_dir": str(folder / "compiled"),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }
        arguments = list(map(str, words)), str(self._out), str(self._error), settings
        self._process = _SERVER.Process(target=_run, args=arguments)
        self._out.unlink(missing_ok=True)
        self._process.start()
        while not self._out.exists():
            time.sleep(0.001)

    def is_alive(self) -> bool:
        """Return whether it has not ended yet."""
        return self._process.is_alive()

    def send(self, signum: int) -> None:
        """Send a signal."""
        os.kill(self._process.pid, signum)

    def end(self, seconds: float = 120) -> tuple[int, str, str]:
        """Wait for so long at most, and return exit code, standard output and standard error."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it does not end"
        return self._process.exitcode, self._out.read_text(), self._error.read_text()


def _run(words, out, error, settings) -> None:
    from based_jax.__main__ import main

    for path, stream in ((out, 1), (error, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    for name, value in settings.items():
        jax.config.update(name, value)
    sys.exit(main(words))

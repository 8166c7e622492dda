"""SIGTERM and Ctrl-C: a run is asked to stop, and saves before it does."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class AgreedStop(KeyboardInterrupt):
    """Ctrl-C, after which this process, and all others of its run, have stopped in good order."""


class Preemption(contextlib.AbstractContextManager):
    """Says after each step whether the run was asked to stop; the loop then saves, waits for the save, and ends.

        with Preemption() as preemption:
            ...
            if preemption.reached(step):
                checkpoints.save(step, state, wait=True)

    One process listens for SIGTERM and SIGINT (Ctrl-C) itself while the context is open; a second signal acts as it
    would without. Python runs signal handlers between operations of the main thread, so a compilation is finished
    first; opened in another thread it hears nothing, and a signal that is ignored stays ignored. Where
    `jax.distributed` is initialised, JAX listens for SIGTERM, which Ctrl-C then becomes, and all processes agree on a
    step soon after the signal.

    Attributes:
      asked: whether this process has heard a signal.
      interrupted: whether it was Ctrl-C.
    """

    def __init__(self):
        self.asked = self.interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            own = SIGNALS if not jax.distributed.is_initialized() else (signal.SIGINT,)
            for number in own:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc_info):
        self._stop_listening()

    def reached(self, step: int) -> bool:
        """Return whether to stop after this step; every process calls it with every step, in the same order."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked

    def _ask(self, signum, frame) -> None:
        self.asked, self.interrupted = True, signum == signal.SIGINT
        self._stop_listening()
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)

    def _stop_listening(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

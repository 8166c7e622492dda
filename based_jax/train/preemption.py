"""SIGTERM: a run is asked to stop, and saves before it does."""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption(contextlib.AbstractContextManager):
    """Says after each step whether the run was asked to stop; the loop then saves, waits for the save, and ends.

        with Preemption() as preemption:
            ...
            if preemption.reached(step):
                checkpoints.save(step, state, wait=True)

    One process listens for SIGTERM itself while the context is open; a second SIGTERM acts as it would without. Python
    runs signal handlers between operations of the main thread, so a compilation is finished first; opened in another
    thread it hears nothing. Where `jax.distributed` is initialised, JAX listens, and all processes agree on a step
    soon after the signal.
    """

    def __init__(self):
        self._asked = False
        self._previous = None

    def __enter__(self):
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and not jax.distributed.is_initialized():
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *exc_info):
        self._stop_listening()

    def reached(self, step: int) -> bool:
        """Return whether to stop after this step; every process calls it with every step, in the same order."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _ask(self, signum, frame) -> None:
        self._asked = True
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

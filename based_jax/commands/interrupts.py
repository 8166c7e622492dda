"""Ctrl-C on the command line: the first one asks a command to stop, a second signal leaves at once."""

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator

LEFT_EXIT_CODE = 130
"""What shells report of a program that Ctrl-C ended."""


@contextlib.contextmanager
def second_one_leaves() -> Iterator[None]:
    """End the process at a second SIGINT or SIGTERM while this is open, whatever the main thread does.

    Python runs a handler only between operations of the main thread, which may compile for minutes: a thread reads
    what the system's own handler writes. Opened in another thread than the main one it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_leave_at_second, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)  # the end of what the thread reads


@contextlib.contextmanager
def sigterm_is_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM too while this is open, so that what is half done is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt("Stopped by a signal.")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def clean_up_after(error: KeyboardInterrupt) -> None:
    """Let go of what an interruption left half done, an event loop say, without a word of it."""
    error.__traceback__ = error.__context__ = None
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _leave_at_second(reader: int) -> None:
    signals = 0
    with os.fdopen(reader, "rb", buffering=0) as file:
        while signals < 2:
            number = file.read(1)
            if not number:
                return
            signals += number[0] in (signal.SIGINT, signal.SIGTERM)
    sys.stderr.write("Left at the second signal; what was saved before it is whole.\n")
    sys.stderr.flush()
    os._exit(LEFT_EXIT_CODE)

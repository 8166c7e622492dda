"""Ctrl-C and SIGTERM on the command line: the first one asks a command to stop, a second signal leaves at once."""

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

LEFT_EXIT_CODE = 130
"""What shells report of a program that Ctrl-C ended."""
SENTENCES = {signal.SIGINT: "Stopped by Ctrl-C.", signal.SIGTERM: "Stopped by a signal."}
LOST_SECONDS = 0.05
"""After which a signal whose exception was lost is heard once more."""


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
def stopped_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt, with a sentence, at SIGINT and SIGTERM, so that what is half done is cleaned up.

    Where the exception is lost, in a callback of the garbage collector say, the signal is heard once more. One that is
    ignored stays ignored; opened in another thread than the main one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hook = sys.unraisablehook

    def hear_again(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, _Stop):
            _call_handler_soon(unraisable.exc_value.signum)
        else:
            hook(unraisable)

    previous = {number: signal.getsignal(number) for number in SENTENCES}
    heard = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]
    sys.unraisablehook = hear_again
    try:
        for number in heard:
            signal.signal(number, _stop)
        yield
    finally:
        for number in heard:
            signal.signal(number, previous[number])
        if sys.unraisablehook is hear_again:
            sys.unraisablehook = hook


class _Stop(KeyboardInterrupt):
    """What a signal asks for, in a sentence."""

    def __init__(self, signum: int):
        super().__init__(SENTENCES[signal.Signals(signum)])
        self.signum = signum


def _stop(signum: int, frame: object) -> NoReturn:
    raise _Stop(signum)


def _call_handler_soon(signum: int) -> None:
    """Call the handler of a signal in a moment, by a timer: the signal itself would count as a second one."""

    def call(*_: object) -> None:
        handler = signal.getsignal(signum)
        if callable(handler):
            handler(signum, None)

    signal.signal(signal.SIGALRM, call)
    signal.setitimer(signal.ITIMER_REAL, LOST_SECONDS)


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
    sys.stderr.write("Ended at once by the second signal; what had been saved by then is complete.\n")
    sys.stderr.flush()
    os._exit(LEFT_EXIT_CODE)

"""Processes beside this one: what one of them sends, and calls that leave no trace in this process."""

import contextlib
import multiprocessing
import multiprocessing.pool
import signal
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from based_jax.errors import UserError

FORK_CONTEXT = multiprocessing.get_context("fork")  # shares what was made before, and is there at once
SPAWN_CONTEXT = multiprocessing.get_context("spawn")  # a process that was forked cannot use a device that was in use


def sent_by_process(context: Any, target: Callable, *arguments: Any, process_name: str | None = None) -> Any:
    """Return what a process sends, which calls `target(sender, *arguments)`.

    Raises:
      RuntimeError: it ends without a word.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *arguments), name=process_name)
    process.start()
    sender.close()  # the other end is the process's alone: its end is the end of the file
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with exit code {process.exitcode}") from None
    except BaseException:  # interrupted: nobody waits for it
        process.kill()
        raise
    finally:
        process.join()


def checked_apart(context: Any, check: Callable, *arguments: Any) -> None:
    """Call a check in a process of its own, which takes the devices with it when it ends.

    A check whose process ends without a word has found nothing: what it checks will tell itself.

    Raises:
      UserError: as the check.
    """
    found = None
    with contextlib.suppress(RuntimeError):
        found = sent_by_process(context, _check_and_send, check, *arguments)
    if found is not None:
        raise UserError(found)


def _check_and_send(sender: connection.Connection, check: Callable, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent ends of it
    _end_at_once()
    try:
        check(*arguments)
        sender.send(None)
    except UserError as error:
        sender.send(str(error))


def forked_pool(processes: int) -> multiprocessing.pool.Pool:
    """Return forked processes that SIGTERM, a pool's end, ends at once.

    As an exception of Python, which the command makes of it, it can come right before a wait and is then never seen.
    One that comes before a process is ready for it waits until then.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return FORK_CONTEXT.Pool(processes, _end_at_once)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_at_once() -> None:
    """Let SIGTERM end this process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

"""Batches before they are needed: a thread reads the next few, and puts them on the device, while a step runs."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

BATCHES_AHEAD = 2
"""That wait at most: one more than hides the time of reading, for a batch that takes longer than others."""


@contextlib.contextmanager
def read_ahead[Batch](read: Callable[[int], Batch], steps: Iterable[int]) -> Iterator[Iterator[Batch]]:
    """Return what `read` gives for each of the steps, in their order; once the context is left no thread is.

    What `read` raises is raised where its batch is asked for, not before.

        with read_ahead(lambda step: feed.arrays(source.batch(step)), range(10)) as batches:
            first = next(batches)
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as thread:
        try:
            yield _in_order(thread, read, steps)
        finally:
            thread.shutdown(cancel_futures=True)


def _in_order[Batch](thread: ThreadPoolExecutor, read: Callable[[int], Batch], steps: Iterable[int]) -> Iterator[Batch]:
    waiting: collections.deque[Future[Batch]] = collections.deque()
    for step in steps:
        waiting.append(thread.submit(read, step))
        if len(waiting) > BATCHES_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

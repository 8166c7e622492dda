"""Texts to ids beside the process that writes them: in a thread, or in processes that share batches of them, or files.

A process is this module run as a program: it takes a tokenizer and then calls with it on its standard input, answers
each on its standard output, and ends with its input, so that none outlives the one that began it.
"""

import collections
import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from based_jax.data.tokenizer import TextTokenizer
from based_jax.data.tokens import token_dtype
from based_jax.errors import UserError

BATCHES_AHEAD = 2
"""Batches that wait for each process, so that none is idle while the first of all is written."""

ANSWERED_ERRORS = (UserError, OSError)
"""Of a call, which the one who calls raises."""

Call = Callable[..., Future[Any]]
"""Of `(function, *arguments)`: calls a function, with the tokenizer before its arguments, beside this thread."""


def encoded[Batch](
    batches: Iterable[Batch], texts: Callable[[Batch], Sequence[str]], tokenizer: TextTokenizer, processes: int
) -> Generator[tuple[Batch, list[np.ndarray]]]:
    """Yield batches in their order with the ids of their texts, in the type that `token_dtype` names.

    The next batches are read while some are encoded. One process means a thread of this one, and the tokenizer's own.

    Raises:
      UserError: a text is no UTF-8, or a process died.
    """
    waiting: collections.deque[tuple[Batch, Future[list[np.ndarray]]]] = collections.deque()
    with _thread(tokenizer) if processes == 1 else calling_processes(tokenizer, processes) as call:
        for batch in batches:
            waiting.append((batch, call(_ids, texts(batch))))
            if len(waiting) > (1 if processes == 1 else BATCHES_AHEAD * processes):
                first, ids = waiting.popleft()
                yield first, ids.result()
        for batch, ids in waiting:
            yield batch, ids.result()


@contextlib.contextmanager
def _thread(tokenizer: TextTokenizer) -> Iterator[Call]:
    with ThreadPoolExecutor(1) as thread:
        yield lambda function, *arguments: thread.submit(function, tokenizer, *arguments)


@contextlib.contextmanager
def calling_processes(tokenizer: TextTokenizer, count: int) -> Iterator[Call]:
    """Return what calls functions of modules, with the tokenizer before their arguments, in so many processes.

    A call raises the UserError or the OSError that its function raises, and UserError where its process died.
    """
    idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    processes: list[_Process] = []

    def call(function: Callable, arguments: tuple) -> Any:
        process = idle.get()
        try:
            return process.call(function, arguments)
        finally:
            idle.put(process)

    with ThreadPoolExecutor(count) as threads:
        try:
            for _ in range(count):
                processes.append(_Process(tokenizer))
                idle.put(processes[-1])
            yield lambda function, *arguments: threads.submit(call, function, arguments)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.end()


class _Process:
    """A process that answers one call at a time."""

    def __init__(self, tokenizer: TextTokenizer):
        own = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | own,
            start_new_session=True,  # a terminal's Ctrl-C is for the process that began it
        )
        self._tokenizer: TextTokenizer | None = tokenizer

    def call(self, function: Callable, arguments: tuple) -> Any:
        """Return `function(tokenizer, *arguments)`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            if self._tokenizer is not None:
                pickle.dump(self._tokenizer, self._process.stdin)
                self._tokenizer = None
            pickle.dump((function, arguments), self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise UserError(
                "A process that encodes text was killed, for want of memory perhaps; take fewer by data.processes."
            ) from None
        if isinstance(answer, ANSWERED_ERRORS):
            raise answer
        return answer

    def end(self) -> None:
        """Kill the process and wait for its end."""
        with contextlib.suppress(BrokenPipeError), self._process:  # of what it was told and has not read
            self._process.kill()


def _serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer calls until there are no more."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        tokenizer = pickle.load(source)
        while True:
            function, arguments = pickle.load(source)
            try:
                answer = function(tokenizer, *arguments)
            except ANSWERED_ERRORS as error:
                answer = error
            pickle.dump(answer, sink)
            sink.flush()


def _ids(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    dtype = token_dtype(tokenizer.vocab_size)
    return [np.fromiter(ids, dtype, len(ids)) for ids in tokenizer.encode_batch(texts)]


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)

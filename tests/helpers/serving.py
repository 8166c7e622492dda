"""A small model that is served in this process, and clients of it."""

import asyncio
import concurrent.futures
import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import openai
from flax import nnx

from based_jax.__main__ import main
from based_jax.data.tokenizer import ByteTokenizer
from based_jax.generate import Event, Sampling, Scheduler, generate
from based_jax.nn.lm import LM, LMConfig
from based_jax.serve import Limits, bound
from based_jax.serve.server import Server, make_service, url_of
from helpers.processes import free_port

LAYERS = (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}), ("window", {"num_heads": 2, "window": 4}))
NAME, LIMITS = "small", {"slots": 8, "queue": 256, "max_len": 96}


def small_model() -> LM:
    """Return a model of bytes with random weights."""
    config = LMConfig(layers=LAYERS, d_model=16, vocab_size=257, dtype="float32", init_std=0.5)
    return nnx.jit(lambda: LM(config, rngs=nnx.Rngs(1)))()


class Serving:
    """A server in a thread of its own, at a port of its own.

    Attributes:
      url: of the API.
      service: what it serves.
    """

    def __init__(self, service, grace: float = 20.0, *, is_warm: bool = True):
        """Start; with `is_warm` wait until all programs are compiled."""
        self._listener, self._ready = bound("127.0.0.1", 0), threading.Event()
        self.service, self.url = service, url_of(self._listener)
        self.server = Server(service, grace, self._ready.set)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(30)
        if is_warm:
            wait_until(lambda: self.server.driver.is_warm)

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self._listener]))

    def stop(self) -> None:
        """End as at a signal, and wait for it."""
        self.server.end()
        self.join()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(60)
        if self._thread.is_alive():
            faulthandler.dump_traceback()  # what each thread waits for
            raise AssertionError("the server has not ended after 60 s")

    @property
    def scheduler(self) -> Scheduler:
        """What the server runs."""
        return self.service.driver._scheduler

    def wait_for_rows(self, count: int) -> None:
        """Wait until so many texts are written or wait."""
        wait_until(lambda: self.service.driver.rows_in_flight == count)

    def wait_until_idle(self) -> None:
        """Wait until all slots are free and nobody waits."""
        self.wait_for_rows(0)
        wait_until(lambda: not self.scheduler.busy)

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a metric."""
        return self.service.metrics.registry.get_sample_value(f"based_jax_{name}", labels) or 0.0


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so, for 60 s at most."""
    for _ in range(6000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come to be so")


@contextlib.contextmanager
def held(server: Serving) -> Iterator[Callable[[], None]]:
    """Let no text go on while this is open, or until what it yields is called."""
    advance, may_advance = server.scheduler.advance, threading.Event()

    def wait_and_advance() -> list[Event]:
        may_advance.wait()
        return advance()

    server.scheduler.advance = wait_and_advance
    try:
        yield may_advance.set
    finally:
        may_advance.set()
        server.scheduler.advance = advance


def served(words: Sequence[str], ask: Callable[[int], object]) -> int:
    """Run the command `serve` until a client has asked at its port, then SIGTERM; return the exit code."""
    port = free_port()

    def listens() -> bool:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    def ask_and_end() -> None:
        try:
            wait_until(listens)
            ask(port)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, _unheard)
    try:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            asked = threads.submit(ask_and_end)
            code = main([*words, f"--port={port}"])
            asked.result()
        return code
    finally:
        signal.signal(signal.SIGTERM, before)


def _unheard(*_: object) -> None:
    raise AssertionError("a signal came that the command does not hear")


@contextlib.contextmanager
def serving(model: LM, *, grace: float = 20.0, api_key: str | None = None, **limits: int) -> Iterator[Serving]:
    """Serve a model of bytes while this is open."""
    service = make_service(model, ByteTokenizer(), NAME, limits=Limits(**limits), api_key=api_key)
    server = Serving(service, grace)
    try:
        yield server
    finally:
        server.stop()


def alone(
    model: LM, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int], row_ids: Sequence[int], max_tokens: int
) -> list[str]:
    """Return the texts that `generate` goes on with, by the seed and the row id of each prompt, at most 100.

    There are always 100 rows, so that nothing is compiled again.
    """
    rows = [*zip(map(ByteTokenizer().encode, prompts), seeds, row_ids, strict=True)]
    rows += rows[:1] * (100 - len(rows))
    ids, seeds, row_ids = zip(*rows, strict=True)
    new = generate(model, ids, max_tokens, sampling, stop=ByteTokenizer.end_of_text, seed=seeds, row_ids=row_ids)
    return [ByteTokenizer().decode(one) for one in new[: len(prompts)]]


def client(server: Serving, key: str = "none") -> openai.OpenAI:
    """Return a client that asks once."""
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=60)


def async_client(server: Serving) -> openai.AsyncOpenAI:
    """Return a client of any number of connections that asks once."""
    return openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)

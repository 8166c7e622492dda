"""How fast a server with a model of random weights answers, over HTTP, by the number of its clients.

Each client asks for a text, reads it as it comes and asks for the next one. What is asked is random tokens; what is
drawn is random too, at temperature 1, and ends where it was asked to.
"""

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from based_jax import compilation
from based_jax.bench import clocks, rows
from based_jax.bench.generate_programs import Subject
from based_jax.bench.serve_clients import Answer
from based_jax.data.tokenizer_file import named_tokenizer
from based_jax.errors import UserError
from based_jax.generate.drafts import Drafts
from based_jax.nn.lm_config import LMConfig
from based_jax.serve.limits import Limits
from based_jax.serve.server import Server, bound, make_service

NAME, TOKENIZER = "random", "gpt2"
CLIENTS_MODULE = "based_jax.bench.serve_clients"
PACKAGES = "starlette", "uvicorn"
POLL_SECONDS = 0.05


class Span(NamedTuple):
    """The least and the most of what is drawn between them."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Return the span of a text such as 64-2048, or of one number; UserError for another."""
        parts = text.split("-")
        if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
            raise UserError(f"'{text}' is no number of tokens: give one, or the least and the most, as in 64-2048.")
        span = cls(int(parts[0]), int(parts[-1]))
        if span.least > span.most:
            raise UserError(f"'{text}' ends before it begins; give the least first.")
        return span


class Load(NamedTuple):
    """What a server is asked.

    Attributes:
      clients: that ask at the same time.
      texts: that each of them asks for.
      prompt, new: tokens of a prompt, and of what follows it.
    """

    clients: int
    texts: int
    prompt: Span
    new: Span


def measure(
    config: LMConfig, loads: Sequence[Load], slots: int | None = None, drafts: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield a row for each load, of one server with `slots`, as many as the most clients if None.

    Raises:
      UserError: a number is below 1, the tokenizer is not the model's, or the model reads fewer tokens.
    """
    server, begin = _server(config, loads, slots, drafts), time.perf_counter()
    slots = server.service.limits.slots
    with compilation.counted_hits() as hits, _running(server) as port:
        first = _asked(port, Load(1, 1, loads[0].prompt, Span(1, 1)), config.vocab_size, seed=2)
        start = _start(server, begin, first[0]) | {"compiled_before": hits.count > 0}
        for load in loads:
            _asked(port, load._replace(texts=1), config.vocab_size, seed=0)
            with clocks.recorded(jax.devices()[0]) as clock:
                answers = _asked(port, load, config.vocab_size, seed=1)
            yield _row(load, slots, drafts, answers) | start | clock | rows.facts(*PACKAGES)


def compile_programs(config: LMConfig, loads: Sequence[Load], slots: int | None = None, drafts: int = 0) -> float:
    """Compile what a server of `measure` runs, and return the seconds that it took.

    A process with the same folder of compiled programs reads them from there.

    Raises:
      UserError: as of `measure`.
    """
    begin = time.perf_counter()
    with _running(server := _server(config, loads, slots, drafts)):
        return _start(server, begin, None)["start_seconds"]


def _start(server: Server, begin: float, first: Answer | None) -> dict[str, float]:
    """Return what a server's start takes, its weights there: until its first answer, and all programs are compiled."""
    while not server.driver.is_warm:
        if server.driver.failure is not None:
            raise server.driver.failure
        time.sleep(POLL_SECONDS)
    warm = {"start_seconds": round(time.perf_counter() - begin, 2)}
    return warm if first is None else warm | {"first_answer_seconds": round(first.ended - begin, 2)}


def _server(config: LMConfig, loads: Sequence[Load], slots: int | None, drafts: int) -> Server:
    """Return a server for the loads, its weights there."""
    slots = max(load.clients for load in loads) if slots is None else slots
    longest = max(load.prompt.most + load.new.most for load in loads)
    limits = Limits(slots=slots, queue=max(load.clients for load in loads), max_len=longest, new_tokens=longest)
    by_lookup, decoder = Drafts.by_lookup(drafts) if drafts else None, Subject(config).decoder
    jax.block_until_ready(decoder.params)
    service = make_service(decoder, named_tokenizer(TOKENIZER), NAME, limits=limits, drafts=by_lookup)
    return Server(service, grace=0.0)


@contextlib.contextmanager
def _running(server: Server) -> Iterator[int]:
    """Run a server in a thread while this is open, and return its port."""
    listener = bound("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.end()
        thread.join()


def _asked(port: int, load: Load, vocab_size: int, seed: int) -> list[Answer]:
    """Return the answers of clients that run in a process of their own; RuntimeError where one has none."""
    rng = np.random.default_rng(seed)

    def body() -> dict[str, Any]:
        prompt, new = (int(rng.integers(span.least, span.most + 1)) for span in (load.prompt, load.new))
        ids = rng.integers(vocab_size, size=prompt).tolist()
        options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 1.0}
        return {"model": NAME, "prompt": ids, "max_tokens": new, "seed": int(rng.integers(2**31))} | options

    bodies = json.dumps([[body() for _ in range(load.texts)] for _ in range(load.clients)])
    command = [sys.executable, "-m", CLIENTS_MODULE, str(port)]
    done = subprocess.run(command, input=bodies, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The clients failed:\n{done.stderr[-2000:]}")
    return [Answer(*answer) for answer in json.loads(done.stdout)]


def _row(load: Load, slots: int, drafts: int, answers: Sequence[Answer]) -> dict[str, Any]:
    seconds = max(x.ended for x in answers) - min(x.asked for x in answers)
    tokens = sum(x.tokens for x in answers)
    first = [1e3 * (x.begun - x.asked) for x in answers]
    between = [1e3 * (x.ended - x.begun) / (x.tokens - 1) for x in answers if x.tokens > 1]
    return {
        "clients": load.clients,
        "slots": slots,
        "texts": len(answers),
        "prompt_tokens": list(load.prompt),
        "new_tokens": list(load.new),
        "drafts": drafts,
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "first_text_milliseconds": _spread(first),
        "token_milliseconds": _spread(between),
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return the median and the 95th percentile."""
    if not values:
        return None
    return {"median": round(statistics.median(values), 3), "p95": round(float(np.percentile(values, 95)), 3)}


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of print."""
    first, between = row["first_text_milliseconds"], row["token_milliseconds"]
    parts = [
        f"{row['clients']} clients of {row['slots']} slots on {row['device']}",
        f"{row['tokens_per_second']:.0f} tokens/s",
        f"first text after {first['median']:.0f} ms ({first['p95']:.0f} for the slowest 5 %)",
    ]
    parts += [f"then {between['median']:.2f} ms a token"] if between else []
    return f"{parts[0]}: {'; '.join(parts[1:])}"

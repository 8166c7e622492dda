"""A model behind a socket, from the first request to the last answer."""

import asyncio
import contextlib
import functools
import ipaddress
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from based_jax.data.tokenizer import Tokenizer
from based_jax.errors import UserError
from based_jax.folders import reason
from based_jax.generate import Decoder, Drafts, PrefixCache, Scheduler
from based_jax.nn.lm import LM
from based_jax.serve.api_errors import shutting_down
from based_jax.serve.app import Service, make_app
from based_jax.serve.driver import Driver
from based_jax.serve.limits import Limits
from based_jax.serve.metrics import Metrics, PrefixCacheMetrics

GRACE_SECONDS = 30.0
LAST_WORDS_SECONDS = 5.0
"""For clients to read what they are told when the grace is over."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
log = logging.getLogger(__name__)


def serve(
    model: LM | Decoder,
    tokenizer: Tokenizer,
    name: str,
    listener: socket.socket,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    grace: float = GRACE_SECONDS,
    drafts: Drafts | None = None,
    ready: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Serve a language model until SIGINT or SIGTERM; requests in flight then have `grace` seconds to end.

    Args:
      model: the language model, or as it is to decode.
      tokenizer: of its texts.
      name: what requests call it.
      listener: where they come in, as `bound` returns it.
      limits: what is answered at most.
      api_key: what requests have to show, as "Authorization: Bearer KEY".
      grace: seconds between the signal and the last token.
      drafts: tokens that are drafted for the model to verify.
      ready: called with a sentence for the user once requests are taken.

    Raises:
      UserError: the tokenizer is not the model's, drafts are not for it, or another server listens there by now.
      Exception: what ended the model.
    """
    service = make_service(model, tokenizer, name, limits=limits or Limits(), api_key=api_key, drafts=drafts)
    if service.api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        log.warning("Whoever reaches this machine may use the model: there is no API key.")
    server = Server(service, grace, lambda: ready(_invitation(service, listener)))
    server.run(sockets=[listener])
    if server.driver.failure is not None:
        raise server.driver.failure


def bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address, 0 for any port that is free; UserError where there can be none."""
    if not 0 <= port < 2**16:
        raise UserError(f"port is {port}; it is 1 to {2**16 - 1}, or 0 for any that is free.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as closed_on_error:
            listener = closed_on_error.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            closed_on_error.pop_all()
            return listener
    except (OSError, UnicodeError) as error:
        raise UserError(f"Nothing can listen at port {port} of '{host}': {reason(error)}.") from None


def make_service(
    model: LM | Decoder,
    tokenizer: Tokenizer,
    name: str,
    *,
    limits: Limits,
    api_key: str | None = None,
    drafts: Drafts | None = None,
) -> Service:
    """Return a model to be served; see `serve`. Its programs are compiled once it is."""
    vocab_size = model.config.vocab_size
    if tokenizer.end_of_text >= vocab_size:
        ids = f"the tokenizer has id {tokenizer.end_of_text}, the model knows ids 0 to {vocab_size - 1}"
        raise UserError(f"The tokenizer is not the model's: {ids}.")
    limits = limits.of_model(model.max_len)
    prefix_cache = PrefixCache(limits.prefix_bytes) if limits.prefix_bytes else None
    scheduler = Scheduler(
        model,
        slots=limits.slots,
        max_len=limits.max_len,
        prefix_cache=prefix_cache,
        tokenizer=tokenizer,
        drafts=drafts,
    )
    metrics = Metrics()
    metrics.gauge("slots", "texts that are written at once", lambda: limits.slots)
    metrics.gauge("slots_used", "slots in use", lambda: scheduler.running)
    metrics.gauge("texts_waiting", "texts that wait for a slot", lambda: scheduler.waiting)
    if scheduler.prefix_cache is not None:
        metrics.registry.register(PrefixCacheMetrics(scheduler.prefix_cache))
    driver = Driver(scheduler, limits.texts, metrics)
    return Service(name, tokenizer, vocab_size, driver, limits, metrics, int(time.time()), api_key)


def _invitation(service: Service, listener: socket.socket) -> str:
    limits = service.limits
    size = f"{limits.slots} texts at once, {limits.queue} may wait, {limits.max_len} tokens each"
    return f"Serving '{service.name}' at {url_of(listener)}: {size}."


def url_of(listener: socket.socket) -> str:
    """Return the URL of the API at a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _places(sockets: Sequence[socket.socket] | None) -> str:
    return ", ".join(map(url_of, sockets or ()))


class Server(uvicorn.Server):
    """Uvicorn that lets what is in flight end when a signal comes, and tells it so once the grace is over."""

    def __init__(self, service: Service, grace: float, ready: Callable[[], None] = lambda: None):
        config = uvicorn.Config(
            make_app(service),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            log_level=logging.WARNING,
            timeout_graceful_shutdown=math.ceil(grace + LAST_WORDS_SECONDS),
        )
        super().__init__(config)
        self.service, self.driver, self._grace, self._ready = service, service.driver, grace, ready
        self.driver.on_failure = self.end

    def end(self) -> None:
        """Begin to end, as at a signal; any thread may call it."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at a signal; unlike in uvicorn it has then been heard, and does not end the process as well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, lambda *_: self.end()) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests, and start the threads of the model; UserError where another server listens by now."""
        try:
            await super().startup(sockets)
        except OSError as error:
            raise UserError(f"Nothing can listen at {_places(sockets)} any more: {reason(error)}.") from None
        self.driver.start()
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests; end those in flight, and the thread of the model."""
        self.driver.close()
        end_all = functools.partial(self.driver.end_all, shutting_down())
        told = asyncio.get_running_loop().call_later(self._grace, end_all)
        try:
            await super().shutdown(sockets)
        finally:
            told.cancel()
            await asyncio.to_thread(self.driver.stop)

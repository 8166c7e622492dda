"""The HTTP interface: which path does what, who may ask, and what is said to what is wrong."""

import asyncio
import dataclasses
import hmac
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from based_jax.data.tokenizer import Tokenizer
from based_jax.generate.prompts import shown
from based_jax.serve.answers import Answer
from based_jax.serve.api_errors import ApiError
from based_jax.serve.completion import Completion, parse_completion
from based_jax.serve.driver import Driver
from based_jax.serve.limits import Limits
from based_jax.serve.metrics import Metrics

BODY_SECONDS = 60.0
"""In which a body has to come."""
BODIES_READ = 8
"""Of a body that is too large so many times the limit is read before it is refused: who still sends does not read."""
CLIENT_GONE = 499
OPEN_PATHS = ("/health",)
"""What is answered without the key."""
WRONG_KEY = "The API key is missing or wrong; it is sent as 'Authorization: Bearer KEY'."


@dataclasses.dataclass(frozen=True)
class Service:
    """A model that is served.

    Attributes:
      name: that requests give it.
      vocab_size: ids that it knows.
      created: when it was loaded, in seconds since 1970.
      api_key: what requests have to show; None for nothing.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    driver: Driver
    limits: Limits
    metrics: Metrics
    created: int
    api_key: str | None = None

    def parse(self, body: bytes) -> Completion:
        """Return what a body asks for; ApiError for what cannot be answered."""
        return parse_completion(body, self.tokenizer, self.limits, self.vocab_size, self.name)

    @property
    def card(self) -> dict[str, object]:
        """The model as the API lists it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "based_jax"}


def make_app(service: Service) -> Starlette:
    """Return the ASGI application that serves a model."""
    app = Starlette(
        routes=[Route(path, call, methods=[method]) for method, path, call in ROUTES],
        middleware=[Middleware(Door, service=service)],
        exception_handlers={ApiError: _refuse, HTTPException: _refuse_path, ClientDisconnect: _gone, Exception: _fail},
    )
    app.state.service = service
    return app


class Door:
    """Lets in who has the key, and counts the answers."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""

        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.responses.labels(message["status"]).inc()
            await send(message)

        app = self._app if self._may_enter(scope) else ApiError(401, WRONG_KEY, code="invalid_api_key").response()
        await app(scope, receive, counted)

    def _may_enter(self, scope: Scope) -> bool:
        if self._service.api_key is None or scope["path"] in OPEN_PATHS:
            return True
        shown_key = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(shown_key, b"Bearer " + self._service.api_key.encode())


async def completions(request: Request) -> Response:
    """Answer a request for completions."""
    service: Service = request.app.state.service
    body = await _read_body(request, service.limits.body_bytes)
    completion = await asyncio.to_thread(service.parse, body)
    answer = Answer(completion, service.name, service.tokenizer, service.driver)
    if completion.stream:
        return EventStream(answer)
    try:
        return JSONResponse(await _while_connected(request, answer.whole()))
    finally:
        answer.close()


class EventStream(StreamingResponse):
    """An answer that streams, given up when its client leaves."""

    def __init__(self, answer: Answer):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(answer.events(), headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer as it comes."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def list_models(request: Request) -> Response:
    """List the one model that is served."""
    return JSONResponse({"object": "list", "data": [request.app.state.service.card]})


async def show_model(request: Request) -> Response:
    """Describe the model of a name."""
    service: Service = request.app.state.service
    if (name := request.path_params["name"]) != service.name:
        raise ApiError(404, f"There is no model {shown(name)}; there is '{service.name}'.", "model", "model_not_found")
    return JSONResponse(service.card)


async def health(request: Request) -> Response:
    """Say whether requests are taken, and none waits for a program that is still compiled."""
    driver: Driver = request.app.state.service.driver
    status = "ending" if not driver.is_open else "ok" if driver.is_warm else "warming up"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


ROUTES: tuple[tuple[str, str, Callable[[Request], Awaitable[Response]]], ...] = (
    ("POST", "/v1/completions", completions),
    ("GET", "/v1/models", list_models),
    ("GET", "/v1/models/{name:path}", show_model),
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
)


async def _read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request; ApiError for one that is no JSON by its header, too large, or does not come."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type is {shown(kind)}; it is application/json.")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part
                elif size > BODIES_READ * limit:
                    break
    except TimeoutError:
        raise ApiError(408, f"The body did not come within {BODY_SECONDS:.0f} s.") from None
    if size > limit:
        raise ApiError(413, f"The body is larger than {limit} bytes.")
    return bytes(body)


async def _while_connected[T](request: Request, answer: Awaitable[T]) -> T:
    """Return an answer; ClientDisconnect once nobody waits for it."""
    work, leaves = asyncio.ensure_future(answer), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((work, leaves), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        leaves.cancel()


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _refuse_path(request: Request, error: Exception) -> Response:
    """Refuse a path that there is not, or a method that it does not have."""
    assert isinstance(error, HTTPException)
    there = ", ".join(f"{method} {path}" for method, path, _ in ROUTES)
    sentence = f"{request.method} {shown(request.url.path)} is none of {there}."
    return ApiError(404 if error.status_code == 404 else 405, sentence).response()


async def _gone(request: Request, error: Exception) -> Response:
    """Return what nobody reads."""
    return Response(status_code=CLIENT_GONE)


async def _fail(request: Request, error: Exception) -> Response:
    """Say that something is wrong here, whose traceback is logged; the door does not see this answer."""
    request.app.state.service.metrics.responses.labels(500).inc()
    return ApiError(500, "The server failed at this request; its log says why.").response()

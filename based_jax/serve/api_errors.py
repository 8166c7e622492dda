"""What a request is refused with, in the shape that OpenAI's clients read."""

import dataclasses
from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
"""What kind of error a status is."""


@dataclasses.dataclass
class ApiError(Exception):
    """A refusal: its status, one sentence, the field of the request that it is about, and a word for programs."""

    status: int
    sentence: str
    param: str | None = None
    code: str | None = None

    def body(self) -> dict[str, Any]:
        """Return the error as JSON."""
        fields = {"message": self.sentence, "type": TYPES[self.status], "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> JSONResponse:
        """Return the answer to the request."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


def shutting_down() -> ApiError:
    """Return what requests are told that a server which ends does not finish."""
    return ApiError(503, "The server shuts down; ask another one, or again later.", code="shutting_down")

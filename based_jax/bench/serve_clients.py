"""Clients of a server, in a process of their own: each asks for one text after the other, and reads it as it comes.

python -m based_jax.bench.serve_clients PORT < requests.json > answers.json

What is read is a list for each client of bodies of requests; what is written is a list of answers.
"""

import asyncio
import json
import sys
import time
from typing import Any, NamedTuple

import h11

HOST, PATH = "127.0.0.1", "/v1/completions"
READ_BYTES = 1 << 16
FIELD = b"data: "


class Answer(NamedTuple):
    """When a text was asked for, began and ended, by one clock of seconds, and how many tokens it has."""

    asked: float
    begun: float
    ended: float
    tokens: int


async def ask(port: int, body: dict[str, Any]) -> Answer:
    """Ask for a text that streams, and read it.

    Raises:
      RuntimeError: the server refuses, or ends before the text does.
    """
    asked, told = time.perf_counter(), list[tuple[float, dict[str, Any]]]()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        connection, content = h11.Connection(h11.CLIENT), json.dumps(body).encode()
        headers = [("Host", HOST), ("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        request = h11.Request(method="POST", target=PATH, headers=headers)
        for part in (request, h11.Data(content), h11.EndOfMessage()):
            writer.write(connection.send(part) or b"")
        async for line in _lines(connection, reader):
            if line.startswith(FIELD + b"{"):
                told.append((time.perf_counter(), json.loads(line.removeprefix(FIELD))))
    finally:
        writer.close()
    texts = [moment for moment, event in told if event.get("choices")]
    usage = [event["usage"] for _, event in told if event.get("usage")]
    if not texts or not usage:
        raise RuntimeError(f"The server ended before the text: {told[-1:]}")
    return Answer(asked, texts[0], texts[-1], usage[-1]["completion_tokens"])


async def _lines(connection: h11.Connection, reader: asyncio.StreamReader):
    """Yield the lines of a response's body as they come."""
    rest, status = b"", 0
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            *lines, rest = (rest + bytes(event.data)).split(b"\n")
            for line in lines:
                yield line
        elif isinstance(event, h11.ConnectionClosed):
            raise RuntimeError("The server closed the connection.")
    if status != 200:
        raise RuntimeError(f"The server answers {status}: {rest.decode(errors='replace')}")


async def ask_all(port: int, clients: list[list[dict[str, Any]]]) -> list[Answer]:
    """Return the answers of all clients, each of which asks again once it is answered."""

    async def one_by_one(bodies: list[dict[str, Any]]) -> list[Answer]:
        return [await ask(port, body) for body in bodies]

    found = await asyncio.gather(*map(one_by_one, clients))
    return [answer for of_client in found for answer in of_client]


if __name__ == "__main__":
    json.dump(asyncio.run(ask_all(int(sys.argv[1]), json.load(sys.stdin))), sys.stdout)

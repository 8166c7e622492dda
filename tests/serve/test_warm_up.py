"""A server before all of its programs are compiled: it says so, and answers what they are there for."""

import threading
import time

import httpx2
import pytest
from helpers.serving import LIMITS, NAME, Serving, client, wait_until

from based_jax.data.tokenizer import ByteTokenizer
from based_jax.serve import Limits
from based_jax.serve.server import make_service


def starting(model, *more):
    """Return a server of the model that compiles more than it needs."""
    service = make_service(model, ByteTokenizer(), NAME, limits=Limits(**LIMITS))
    scheduler, own = service.driver._scheduler, service.driver._scheduler.programs()
    scheduler.programs = lambda: [*own, *more]
    return Serving(service, is_warm=False)


def health(server):
    """Return the status code and the word."""
    response = httpx2.get(server.url.replace("/v1", "/health"))
    return response.status_code, response.json()["status"]


def test_texts_are_answered_while_a_program_that_none_needs_is_compiled(model, server):
    asked = {"model": NAME, "prompt": "While it compiles", "max_tokens": 9, "seed": 5}
    gate = threading.Event()
    other = starting(model, gate.wait)
    try:
        assert health(other) == (503, "warming up")
        text = client(other).completions.create(**asked).choices[0].text
        assert text == client(server).completions.create(**asked).choices[0].text
        assert health(other) == (503, "warming up")
        gate.set()
        wait_until(lambda: health(other) == (200, "ok"))
        assert client(other).completions.create(**asked).choices[0].text == text
    finally:
        gate.set()
        other.stop()


def test_what_cannot_be_compiled_ends_the_server(model):
    def fails():
        raise MemoryError("no room for a program")

    other = starting(model, fails)
    other.join()
    assert isinstance(other.server.driver.failure, MemoryError)


def test_a_server_that_ends_compiles_no_more(model):
    begun, gate, late = threading.Event(), threading.Event(), []

    def compiles():
        begun.set()
        gate.wait(10)

    other = starting(model, *[compiles] * 100, lambda: late.append(time.monotonic()))
    try:
        assert begun.wait(60)
        other.stop()
    finally:
        gate.set()
    with pytest.raises(httpx2.ConnectError):
        health(other)
    time.sleep(0.2)
    assert not late

"""The command, from its arguments to the signal that ends it."""

import logging
import socket
import sys

import openai
import pytest
from helpers.serving import LIMITS, served

from based_jax.__main__ import main
from based_jax.commands import serve as command
from based_jax.data.tokenizer import ByteTokenizer
from based_jax.serve import bound

WORDS = ("serve", "--workdir=runs/small", *(f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()))


@pytest.fixture
def loads(model, monkeypatch):
    """Let the command load a model that others have compiled."""
    monkeypatch.setattr(command, "load_text_model", lambda args: (model, ByteTokenizer()))


def asked(key):
    """Return what asks a server for its model and a token, and returns their names."""

    def ask(port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
        (card,) = client.models.list().data
        names.append(card.id)
        assert client.completions.create(model=card.id, prompt="a", max_tokens=1).usage.completion_tokens == 1

    names = []
    return ask, names


def test_it_says_where_it_serves_and_ends_at_a_signal(loads, capsys):
    ask, names = asked("none")
    assert served(WORDS, ask) == 0
    out, error = capsys.readouterr()
    assert names == ["small"] and error == ""
    assert out.startswith("Serving 'small' at http://127.0.0.1:")
    assert out.endswith("/v1: 8 texts at once, 256 may wait, 96 tokens each.\n")


def test_a_name_a_key_of_the_environment_and_a_host(loads, capsys, monkeypatch, caplog):
    monkeypatch.setenv(command.API_KEY_VARIABLE, "k-1")
    ask, names = asked("k-1")
    with caplog.at_level(logging.WARNING):
        assert served([*WORDS, "--name=other", "--host=0.0.0.0", "--grace=1"], ask) == 0
    assert names == ["other"] and not caplog.records
    monkeypatch.delenv(command.API_KEY_VARIABLE)
    with caplog.at_level(logging.WARNING):
        assert served([*WORDS, "--host=0.0.0.0"], asked("none")[0]) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "Whoever reaches this machine may use the model: there is no API key."
    ]


def test_a_port_that_is_taken_and_a_tokenizer_of_another_model_are_said(loads, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main([*WORDS, f"--port={port}"]) == 2
    assert capsys.readouterr().err == (
        f"Error: Nothing can listen at port {port} of '127.0.0.1': Address already in use.\n"
    )
    monkeypatch.setattr(ByteTokenizer, "end_of_text", 257)
    assert main([*WORDS, "--port=0"]) == 2
    assert capsys.readouterr().err == (
        "Error: The tokenizer is not the model's: the tokenizer has id 257, the model knows ids 0 to 256.\n"
    )


def test_a_port_that_another_takes_while_the_model_loads_is_said(model, capsys, monkeypatch):
    def load(args):
        other.listen()
        return model, ByteTokenizer()

    with bound("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(command, "load_text_model", load)
        assert main([*WORDS, f"--port={port}"]) == 2
    assert capsys.readouterr().err == (
        f"Error: Nothing can listen at http://127.0.0.1:{port}/v1 any more: Address already in use.\n"
    )


def test_what_is_missing_is_named(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("based_jax.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(WORDS) == 2
    assert (
        capsys.readouterr().err == "Error: serve needs uvicorn: pip install -e '.[serve]' in the checkout brings it.\n"
    )

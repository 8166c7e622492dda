"""The clients that time a server, against one, and what is told of their answers."""

import asyncio
from urllib.parse import urlsplit

import pytest
from helpers.serving import NAME

from based_jax.bench import serve
from based_jax.bench.serve_clients import Answer, ask_all
from based_jax.errors import UserError

BODY = {"model": NAME, "prompt": [72, 105], "stream": True, "stream_options": {"include_usage": True}, "seed": 3}


def test_clients_ask_one_text_after_the_other(server):
    port = urlsplit(server.url).port
    bodies = [[BODY | {"max_tokens": tokens} for tokens in of_client] for of_client in ((5, 30), (17,), (40, 2))]
    answers = asyncio.run(ask_all(port, bodies))
    assert all(answer.asked < answer.begun <= answer.ended for answer in answers)
    assert sum(answer.tokens for answer in answers) > 30
    assert answers[0].ended <= answers[1].asked and answers[2].asked < answers[0].ended
    with pytest.raises(RuntimeError, match=r"The server answers 404: .*it is 'small'"):
        asyncio.run(ask_all(port, [[BODY | {"model": "large"}]]))


def test_a_row_says_what_clients_waited_for():
    load = serve.Load(2, 1, serve.Span.parse("64-2048"), serve.Span.parse("9"))
    row = serve._row(load, 2, 0, [Answer(10.0, 10.5, 11.5, 11), Answer(10.0, 10.25, 12.0, 1)])
    assert (row["prompt_tokens"], row["new_tokens"], row["texts"], row["tokens"]) == ([64, 2048], [9, 9], 2, 12)
    assert row["tokens_per_second"] == 6 and row["seconds"] == 2
    assert row["first_text_milliseconds"]["median"] == 375 and row["token_milliseconds"]["median"] == 100
    assert "2 clients of 2 slots on cpu: 6 tokens/s; first text after 375 ms" in serve.line(row | {"device": "cpu"})
    for text in ("9-3", "0", "3-", "a"):
        with pytest.raises(UserError, match=f"^'{text}'"):
            serve.Span.parse(text)

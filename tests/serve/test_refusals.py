"""What is wrong with a request is told in one sentence, with a status of its own, in the shape that clients read."""

import json
import socket

import httpx2
import openai
import pytest
from helpers.serving import LIMITS, NAME, client, serving, wait_until

from based_jax.data.tokenizer import ByteTokenizer
from based_jax.serve import Limits, app
from based_jax.serve.api_errors import ApiError
from based_jax.serve.completion import FIELDS, parse_completion

GOOD = {"model": NAME, "prompt": "a", "max_tokens": 1}
JSON = {"Content-Type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
"""And the first of nine bytes."""


def one_sentence(response, status):
    """Return the error that a response tells, which has all that OpenAI's have."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"][-1] == "." and "\n" not in error["message"] and len(error["message"]) < 400
    return error


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"temperature": -1}, "temperature", "temperature is -1; it is 0 for greedy, or above."),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'; it is a number."),
        ({"temperature": 1e999}, "temperature", "Infinity is no number of JSON"),
        ({"top_p": 0}, "top_p", "top_p is 0; it is above 0 and at most 1."),
        ({"top_k": 1.5}, "top_k", "top_k is 1.5; it is an integer."),
        ({"n": 0}, "n", "n is 0; it is at least 1."),
        ({"n": 265}, "n", "The request asks for 265 texts; at most 264 are written or wait."),
        ({"n": True}, "n", "n is True; it is at least 1."),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it is at least 1."),
        ({"max_tokens": 10**400}, "max_tokens", "it is at most 4096."),
        ({"max_tokens": 96}, "prompt", "The prompt has 1 tokens and max_tokens is 96; together they are at most 96."),
        ({"prompt": "a" * 96}, "prompt", "The prompt has 96 tokens and max_tokens is 1; together"),
        ({"prompt": 3}, "prompt", "prompt is 3; it is a text, token ids, or a list of such."),
        ({"prompt": ["a", 3]}, "prompt", "Prompt 1 is 3; it is a list of token ids."),
        ({"prompt": [3, "a"]}, "prompt", "Prompt 0 has 'a'; token ids are integers."),
        ({"prompt": [[1], [257]]}, "prompt", "Prompt 1 has id 257; the model knows ids 0 to 256."),
        ({"prompt": "\ud800"}, "prompt", "prompt is '\\ud800', which has half of a surrogate pair."),
        ({"seed": -1}, "seed", "seed is -1; it is an integer from 0 to 18446744073709551615."),
        ({"stop": ["a", ""]}, "stop", "stop is ['a', '']; it is a text, or a list of at most 4, none empty."),
        ({"stop": list("abcde")}, "stop", "it is a text, or a list of at most 4"),
        ({"stop": ["a", "\ud800"]}, "stop", "stop is '\\ud800', which has half of a surrogate pair."),
        ({"logprobs": 6}, "logprobs", "logprobs is 6; it is 0, for those of the tokens that are drawn, up to 5 for"),
        ({"logprobs": 0, "echo": True}, "logprobs", "logprobs is 0 and echo is true; tokens of a prompt have none"),
        ({"echo": 1}, "echo", "echo is 1; it is true or false."),
        ({"stream_options": {"a": 1}}, "stream_options", "stream_options has 'a': 1; it may have include_usage"),
        ({"best_of": 2}, "best_of", "best_of is 2; it is 1."),
        ({"suffix": "end"}, "suffix", "suffix is 'end'; it is empty"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "logit_bias is {'1': 2}; it is empty."),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty is 0.5; it is 0."),
        ({"\ud800": 1}, "\\ud800", "Unknown field '\\ud800'; there are model, prompt, max_tokens"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_a_field_that_is_wrong(server, fields, param, sentence):
    response = httpx2.post(f"{server.url}/completions", content=json.dumps(GOOD | fields), headers=JSON)
    error = one_sentence(response, 400)
    assert sentence in error["message"]
    assert error["param"] == (None if "no number" in sentence else param)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is no JSON: Expecting value"),
        (b'{"model": ', "The body is no JSON: Expecting value"),
        (b'{"a": "\xff"}', "The body is no JSON: 'utf-"),
        (b"[" * 100_000, "The body is no JSON: maximum recursion depth"),
        (b"[1]", "The body is [1]; it is a JSON object."),
        (b'{"n": ' + b"9" * 5000 + b"}", "The body is no JSON: Exceeds the limit"),
        (b'{"temperature": NaN}', "The body is no JSON: NaN is no number of JSON."),
    ],
)
def test_a_body_that_is_none(server, body, sentence):
    response = httpx2.post(f"{server.url}/completions", content=body, headers=JSON)
    assert sentence in one_sentence(response, 400)["message"]


ODD_VALUES = (
    NAME,
    None,
    True,
    -1,
    0,
    3,
    1.5,
    1e308,
    2**70,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    [[1, None]],
    {"x": []},
)


@pytest.mark.parametrize("name", FIELDS)
def test_any_value_of_a_field_is_read_or_refused(name):
    limits, refused = Limits(**LIMITS), 0
    for value in ODD_VALUES:
        body = json.dumps(GOOD | {name: value}).encode()
        try:
            completion = parse_completion(body, ByteTokenizer(), limits, 257, NAME)
            assert completion.prompts and all(map(len, completion.prompts))
        except ApiError as error:
            refused += 1
            assert error.status in (400, 404) and json.dumps(error.body()) and error.sentence.encode()
    assert 0 < refused < len(ODD_VALUES)


def test_another_model_path_method_or_type(server):
    url = f"{server.url}/completions"
    error = one_sentence(httpx2.post(url, json=GOOD | {"model": "gpt"}), 404)
    assert (error["message"], error["code"]) == ("model is 'gpt'; it is 'small'.", "model_not_found")
    assert one_sentence(httpx2.get(f"{server.url}/models/gpt"), 404)["code"] == "model_not_found"
    there = "is none of POST /v1/completions, GET /v1/models"
    assert (
        f"POST '/v1/chat/completions' {there}"
        in one_sentence(httpx2.post(f"{server.url}/chat/completions", json=GOOD), 404)["message"]
    )
    assert f"GET '/v1/completions' {there}" in one_sentence(httpx2.get(url), 405)["message"]
    wrong = one_sentence(httpx2.post(url, content=json.dumps(GOOD), headers={"Content-Type": "text/plain"}), 415)
    assert wrong["message"] == "Content-Type is 'text/plain'; it is application/json."
    assert httpx2.post(url, json=GOOD).status_code == 200


def test_a_large_body_a_key_and_a_server_of_other_limits(model):
    with serving(model, **LIMITS | {"body_bytes": 1000, "new_tokens": 3}, api_key="k-1") as other:
        url, headers = f"{other.url}/completions", {"Authorization": "Bearer k-1"}
        for body in (b" " * 2000, iter([b" " * 600] * 3)):
            response = httpx2.post(url, content=body, headers=JSON | headers)
            assert one_sentence(response, 413)["message"] == "The body is larger than 1000 bytes."
        error = one_sentence(httpx2.post(url, json=GOOD | {"max_tokens": 4}, headers=headers), 400)
        assert error["message"] == "max_tokens is 4; it is at most 3."
        for key in ("k-2", "K-1", "k-11", "k"):
            with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong; it is sent as"):
                client(other, key=key).completions.create(**GOOD)
        assert one_sentence(httpx2.get(f"{other.url}/models"), 401)["code"] == "invalid_api_key"
        assert client(other, key="k-1").completions.create(**GOOD).choices
        assert httpx2.get(other.url.replace("/v1", "/health")).status_code == 200


def test_a_body_that_does_not_come(server, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
    address = httpx2.URL(server.url)
    with socket.create_connection((address.host, address.port), timeout=10) as connection:
        connection.sendall(HEAD)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_before_its_body_has_come(server, caplog):
    address, before = httpx2.URL(server.url), server.metric("http_responses_total", status="499")
    with socket.create_connection((address.host, address.port), timeout=10) as connection:
        connection.sendall(HEAD)
    wait_until(lambda: server.metric("http_responses_total", status="499") == before + 1)
    assert not caplog.records


def test_what_nobody_foresaw_is_told_and_logged(server, monkeypatch, caplog):
    monkeypatch.setattr(app, "parse_completion", lambda *_: 1 // 0)
    error = one_sentence(httpx2.post(f"{server.url}/completions", json=GOOD), 500)
    assert error["message"] == "The server failed at this request; its log says why."
    wait_until(lambda: "ZeroDivisionError" in caplog.text)
    assert server.metric("http_responses_total", status="500") == 1

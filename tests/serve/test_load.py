"""Many clients at once: no answer is wrong, lost or another's; who leaves, or comes late, costs the others nothing."""

import asyncio

import openai
import pytest
from helpers.serving import LIMITS, NAME, alone, async_client, client, held, serving

from based_jax.generate import Sampling

CLIENTS = 200
SAMPLINGS = (Sampling(), Sampling(temperature=1.0, top_p=0.9))
MAX_TOKENS = 12


def prompts_of(rng, count):
    """Return texts of 2 to 30 letters, each another one."""
    return [f"{number}:" + "".join(rng.choice(list("abcdefgh "), rng.integers(26))) for number in range(count)]


def options(prompt, sampling, seed):
    """Return the fields of a request."""
    fields = {"model": NAME, "prompt": prompt, "max_tokens": MAX_TOKENS, "seed": seed}
    return fields | {"temperature": sampling.temperature, "top_p": sampling.top_p}


async def streamed(clients, fields, parts=None):
    """Return the text of an answer that streams, or of its first parts, after which the client leaves."""
    stream = await clients.completions.create(**fields, stream=True)
    texts = []
    async for chunk in stream:
        texts.append(chunk.choices[0].text)
        if len(texts) == parts:
            await stream.close()
            break
    return "".join(texts)


async def whole(clients, fields):
    """Return the text of an answer that does not stream."""
    return (await clients.completions.create(**fields)).choices[0].text


def test_two_hundred_clients_get_each_their_own_answer(model, server, rng):
    """Half of them stream; every eighth asks beside that for a text that it does not read to its end."""
    prompts, seeds = prompts_of(rng, CLIENTS), rng.integers(2**63, size=CLIENTS).tolist()
    samplings = [SAMPLINGS[number % 2] for number in range(CLIENTS)]
    expected = [""] * CLIENTS
    for parity, sampling in enumerate(SAMPLINGS):
        expected[parity::2] = alone(
            model, prompts[parity::2], sampling, seeds[parity::2], [0] * (CLIENTS // 2), MAX_TOKENS
        )
    fields = [options(*one) for one in zip(prompts, samplings, seeds, strict=True)]

    async def ask():
        async with async_client(server) as clients:
            answers = [(whole, streamed)[number // 2 % 2](clients, one) for number, one in enumerate(fields)]
            leave = [streamed(clients, one | {"max_tokens": 50}, parts=1) for one in fields[::8]]
            together = await asyncio.gather(*answers, *leave)
            return together[:CLIENTS]

    assert asyncio.run(ask()) == expected
    assert len(set(expected)) > CLIENTS // 2
    server.wait_until_idle()


FULL = {"model": NAME, "prompt": "In the beginning ", "max_tokens": 70, "temperature": 0, "n": 264}
"""Asks for as many texts as may be written or wait."""


def test_a_full_queue_is_said_and_a_client_that_leaves_makes_room(server):
    asker, cancelled = client(server), server.metric("texts_finished_total", reason="cancelled")
    with held(server):
        with asker.completions.create(**FULL, stream=True):
            server.wait_for_rows(264)
            with pytest.raises(openai.RateLimitError, match="at most 264 may; ask again in a moment") as refused:
                asker.completions.create(model=NAME, prompt="a")
        assert refused.value.code == "queue_full" and refused.value.response.headers["Retry-After"] == "1"
        server.wait_for_rows(0)
        with pytest.raises(openai.APITimeoutError):
            asker.with_options(timeout=0.5).completions.create(**FULL)
        server.wait_for_rows(0)
    assert server.metric("texts_finished_total", reason="cancelled") == cancelled + 2 * 264
    server.wait_until_idle()
    assert asker.completions.create(model=NAME, prompt="a", max_tokens=1).usage.completion_tokens == 1


async def answer_or_error(clients, number):
    try:
        return await streamed(clients, options(f"{number}: text", SAMPLINGS[0], 0) | {"max_tokens": 40})
    except openai.APIError as error:
        return error


async def asked_of_one_that_goes_on(server, count):
    async with async_client(server) as clients:
        return await asyncio.gather(*(answer_or_error(clients, number) for number in range(count)))


async def asked_of_one_that_ends(server, count, end):
    """Return what each of many streams gets of a server that ends once it has them all: its text, or an error."""
    with held(server) as go_on:
        async with async_client(server) as clients:
            asked = [asyncio.create_task(answer_or_error(clients, number)) for number in range(count)]
            await asyncio.to_thread(server.wait_for_rows, count)
            end(server, go_on)
            answers = await asyncio.gather(*asked)
    server.join()
    assert server.service.driver.rows_in_flight == 0
    return answers


def end_and_go_on(server, go_on):
    server.server.end()
    go_on()


def fail(server, go_on):
    server.scheduler.advance = None  # is called next
    go_on()


def test_what_is_in_flight_ends_before_the_server_does(model, server):
    with serving(model, **LIMITS) as other:
        answers = asyncio.run(asked_of_one_that_ends(other, 24, end_and_go_on))
        with pytest.raises(openai.APIConnectionError):
            client(other).completions.create(model=NAME, prompt="a")
    assert answers == asyncio.run(asked_of_one_that_goes_on(server, 24))
    assert all(isinstance(answer, str) and answer for answer in answers)


def test_what_is_in_flight_when_the_grace_is_over_is_told(model):
    with serving(model, **LIMITS, grace=0.01) as server:
        told = asyncio.run(asked_of_one_that_ends(server, 100, lambda server, _: server.server.end()))
    assert [error.message for error in told] == ["The server shuts down; ask another one, or again later."] * 100


def test_a_model_that_fails_is_told_and_ends_the_server(model, caplog):
    with serving(model, **LIMITS) as server:
        told = asyncio.run(asked_of_one_that_ends(server, 20, fail))
        assert isinstance(server.service.driver.failure, TypeError)
    assert {error.message for error in told} == {"The model failed, and the server ends; its log says why."}
    assert "TypeError" in caplog.text

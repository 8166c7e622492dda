import pytest
from helpers.serving import LIMITS, NAME, alone, client

from based_jax.data.tokenizer import ByteTokenizer
from based_jax.generate import Request, Sampling, Scheduler, blocks, intake, rows, state_layout

TOKENIZER = ByteTokenizer()
TEXT = "In the beginning "


@pytest.fixture(scope="module")
def completions(server):
    return client(server).completions


def create(completions, **fields):
    return completions.create(**{"model": NAME, "prompt": TEXT, "max_tokens": 20, "temperature": 0} | fields)


def streamed(completions, **fields):
    """Return the texts of each choice as they came, and the chunks."""
    chunks = list(create(completions, stream=True, **fields))
    texts = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts.setdefault(choice.index, []).append(choice.text)
    return texts, chunks


def test_choices_are_the_rows_of_generate(completions, model):
    fields = {"prompt": [TEXT, "A"], "n": 2, "seed": 2**40 + 7, "temperature": 1.5, "top_p": 0.9}
    answer = create(completions, **fields, extra_body={"top_k": 50})
    sampling = Sampling(temperature=1.5, top_p=0.9, top_k=50)
    expected = alone(model, [TEXT, TEXT, "A", "A"], sampling, [2**40 + 7] * 4, range(4), 20)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    drawn = answer.usage.completion_tokens
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", NAME, "cmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (18, 18 + drawn)
    texts, _ = streamed(completions, **fields, extra_body={"top_k": 50})
    assert ["".join(texts[index]) for index in range(4)] == [choice.text for choice in answer.choices]


def test_a_stream_is_the_whole_in_pieces(completions):
    whole = create(completions, max_tokens=50, echo=True)
    texts, chunks = streamed(completions, max_tokens=50, echo=True, stream_options={"include_usage": True})
    assert len(texts[0]) >= 3 and "".join(texts[0]) == whole.choices[0].text
    assert texts[0][0].startswith(TEXT) and whole.choices[0].text.count(TEXT) == 1
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons == [None] * (len(texts[0]) - 1) + [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_token_ids_and_empty_prompts(completions):
    of_text = create(completions).choices[0].text
    assert create(completions, prompt=TOKENIZER.encode(TEXT), echo=True).choices[0].text == TEXT + of_text
    assert [choice.text for choice in create(completions, prompt=[[65], TOKENIZER.encode(TEXT)]).choices][1] == of_text
    begun = create(completions, prompt=[TOKENIZER.end_of_text])
    for empty in ("", []):
        answer = create(completions, prompt=empty)
        assert answer.choices[0].text == begun.choices[0].text and answer.usage.prompt_tokens == 1


def test_a_stop_string_ends_a_text_and_is_not_part_of_it(completions, server):
    text = create(completions, max_tokens=40).choices[0].text
    stop = text[7:10]
    answer = create(completions, max_tokens=70, stop=["never", stop])
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    texts, _ = streamed(completions, max_tokens=70, stop=stop)
    assert "".join(texts[0]) == choice.text
    assert answer.usage.completion_tokens < 40
    server.wait_until_idle()


@pytest.mark.parametrize("temperature", [0, 2])
def test_log_probabilities_are_the_scheduler_s_and_stand_where_their_tokens_do(completions, model, temperature):
    (choice,) = create(completions, logprobs=0, max_tokens=8, temperature=temperature, seed=1).choices
    scheduler = Scheduler(model, slots=LIMITS["slots"], max_len=LIMITS["max_len"])
    scheduler.submit(Request(TOKENIZER.encode(TEXT), 8, Sampling(temperature=temperature), seed=1))
    events = []
    while scheduler.busy:
        events += scheduler.advance()
    found = choice.logprobs
    assert found.token_logprobs == [log_prob for event in events for log_prob in event.log_probs]
    assert found.tokens == [TOKENIZER.decode([token]) for event in events for token in event.tokens]
    assert len(found.tokens) == 8
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert token == "\ufffd" or choice.text[offset:].startswith(token)


def test_the_likeliest_tokens_stand_beside_those_that_are_drawn(completions):
    fields = {"max_tokens": 6, "temperature": 2, "seed": 1}
    own, found = (create(completions, **fields, logprobs=count).choices[0].logprobs for count in (0, 2))
    assert own.token_logprobs == found.token_logprobs and own.top_logprobs is None
    for token, log_prob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert token in top and len(top) <= 3 and (token == "\ufffd" or top[token] == log_prob)
        assert max(top.values()) >= log_prob
    _, chunks = streamed(completions, **fields, logprobs=2)
    parts = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert [top for part in parts for top in part.top_logprobs or ()] == found.top_logprobs


def test_no_request_waits_for_a_compiler(completions):
    """Prompts of any number of tokens, whole chunks and padded ones, and those that go on from a state."""
    programs = intake._read, blocks.decoding_loop, rows._with_rows, rows._with_state
    programs += state_layout._taken, state_layout._put
    before = [program._cache_size() for program in programs]
    for length in (1, 2, 16, 17, 65, 66, 94):
        assert create(completions, prompt="c" * length, max_tokens=1).usage.prompt_tokens == length
    assert [program._cache_size() for program in programs] == before


def test_without_a_seed_draws_differ(completions):
    texts = {create(completions, temperature=2).choices[0].text for _ in range(3)}
    assert len(texts) == 3
    assert create(completions, max_tokens=None).usage.completion_tokens == 16


def test_a_prompt_goes_on_from_the_state_of_one_that_began_alike(completions, server):
    other = {"prompt": "In the beginning of it: " + "b" * 20}
    cold = create(completions, **other).choices[0].text
    hits, restored = server.metric("prefix_hits_total"), server.metric("prefix_tokens_restored_total")
    assert create(completions, **other).choices[0].text == cold
    assert server.metric("prefix_hits_total") == hits + 1
    assert server.metric("prefix_tokens_restored_total") == restored + len(other["prompt"]) - 1
    create(completions, prompt="a")
    assert server.metric("prefix_misses_total", reason="too short") >= 1


def test_models_health_and_metrics(server):
    asker = client(server)
    (card,) = asker.models.list().data
    assert (card.id, card.owned_by) == (NAME, "based_jax") and asker.models.retrieve(NAME) == card
    root = server.url.removesuffix("/v1")
    health = asker.get(f"{root}/health", cast_to=dict)
    assert health == {"status": "ok"}
    before = server.metric("generated_tokens_total")
    asker.completions.create(model=NAME, prompt="a", max_tokens=3, temperature=0)
    assert server.metric("generated_tokens_total") == before + 3
    text = asker.get(f"{root}/metrics", cast_to=str)
    for name in (
        "slots 8.0",
        'http_responses_total{status="200"}',
        "time_to_first_token_seconds_count",
        "slots_used 0.0",
    ):
        assert f"based_jax_{name}" in text

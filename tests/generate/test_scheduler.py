"""Requests that share slots, come, go and stop."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.cases import parametrize_some
from helpers.decoding import random_decoder
from helpers.small_mixers import SMALL

from based_jax.data.tokenizer import ByteTokenizer
from based_jax.errors import UserError
from based_jax.generate import (
    PrefixCache,
    Request,
    Sampling,
    Scheduler,
    State,
    generate,
    state_after,
    stream,
)
from based_jax.generate.decoder import Decoder
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS

LAYERS = (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}), ("window", {"num_heads": 2, "window": 4}))
HOT = Sampling(temperature=1.5, top_k=40, top_p=0.9)
REQUESTS = [
    Request([72, 105], 7, HOT, seed=3),
    Request([1], 5),
    Request(list(range(40)), 9, Sampling(2.0), seed=2**40, row_id=7),
    Request([5, 6, 7], 1, HOT),
    Request([9, 9], 12, Sampling(0.7, top_k=3), seed=1),
]


@pytest.fixture(scope="module")
def decoder():
    config = LMConfig(layers=LAYERS, d_model=16, vocab_size=257, dtype="float32", init_std=0.5)
    return Decoder.of(nnx.jit(lambda: LM(config, rngs=nnx.Rngs(1)))())


@pytest.fixture(scope="module")
def alone(decoder):
    """Return the tokens and log-probabilities of each request, answered alone in one of two slots."""
    return [answers(decoder, [request])[0] for request in REQUESTS]


def scheduler_of(decoder, **options):
    """Return a scheduler whose blocks and chunks are shorter than the requests."""
    return Scheduler(decoder, **{"slots": 2, "max_len": 64, "block_tokens": 3, "chunk_tokens": 16} | options)


def collected(events):
    """Return the tokens, log-probabilities, text and finish reason of each id."""
    found = {}
    for event in events:
        tokens, log_probs, text, finish = found.get(event.id, ([], [], "", None))
        assert finish is None, "an event after the last"
        found[event.id] = (tokens + event.tokens, log_probs + event.log_probs, text + event.text, event.finish)
    return found


def finished(scheduler):
    """Yield the events until nothing is left to do."""
    while scheduler.busy:
        yield from scheduler.advance()


def answers(decoder, requests, **options):
    """Return the answer of each request, all submitted at once."""
    scheduler = scheduler_of(decoder, **options)
    for request in requests:
        scheduler.submit(request)
    return collected(finished(scheduler))


def test_a_request_is_answered_as_alone_wherever_it_enters_the_batch(decoder, alone):
    scheduler, events = scheduler_of(decoder), []
    for request in REQUESTS:  # into a batch that runs
        scheduler.submit(request)
        events += scheduler.advance()
    found = collected([*events, *finished(scheduler)])
    for number, (tokens, log_probs, _, finish) in enumerate(alone):
        assert found[number][0] == tokens and len(tokens) == REQUESTS[number].max_new_tokens
        assert found[number][1] == pytest.approx(log_probs, abs=1e-5)
        assert found[number][3] == finish == "length"


SHORT = [Request([*range(length)], 4, HOT, seed=length) for length in (1, 40, 3, 65, 100, 8, 66, 9, 64, 128)]
WIDE = {"slots": 8, "max_len": 256, "chunk_tokens": 256}
"""A chunk of this scheduler has four rows of 64 tokens, or two of 128."""


def test_a_prompt_that_is_read_with_others_is_answered_bitwise_as_alone(decoder):
    """Wherever it stands among them, with one more of its length or with three."""
    together = [answers(decoder, order, **WIDE) for order in (SHORT, SHORT[::-1])]
    for number, request in enumerate(SHORT):
        alone = answers(decoder, [request], **WIDE)[0]
        assert together[0][number] == together[1][len(SHORT) - 1 - number] == alone


BUDGET = {"num_heads": 2, "cache_policy": "h2o", "cache_budget": 24}
LAYER = {kind: (kind, SMALL.get(kind, {})) for kind in MIXERS} | {"a budget": ("attention", BUDGET)}


@parametrize_some("kind", LAYER, ordinary=("attention",))
def test_any_mixer_reads_prompts_in_company_bitwise_as_alone(kind):
    """Some begin while others go on, behind their first 16 tokens, in rows that others have left."""
    decoder = random_decoder(LMConfig((LAYER[kind],), d_model=16, vocab_size=257))
    requests = [Request([length + 7 * i for i in range(length)], 3) for length in (3, 30, 9, 20, 2)]

    def answered(*requests):
        sizes = {"slots": 4, "max_len": 64, "chunk_tokens": 128}
        return answers(decoder, requests, **sizes, prefix_cache=PrefixCache(10**7))

    together = answered(*requests)
    for number, request in enumerate(requests):
        assert together[number] == answered(request)[0]


@pytest.mark.parametrize(
    ("lengths", "prompt_tokens", "running"),
    [((3, 40, 1, 65), 1, 4), ((3, 66, 40, 66, 5), 1, 3), ((66, 3, 40, 66, 5), 1, 2), ((66, 3, 40, 66, 5), 257, 5)],
)
def test_one_program_reads_the_oldest_prompt_and_those_of_its_length(decoder, lengths, prompt_tokens, running):
    scheduler = scheduler_of(decoder, **WIDE, prompt_tokens=prompt_tokens)
    for length in lengths:
        scheduler.submit(Request([*range(length)], 5))
    scheduler.advance()
    assert (scheduler.running, scheduler.waiting) == (running, len(lengths) - running)


def test_the_first_token_does_not_wait_for_a_block(decoder, alone):
    """Neither of a request that comes first nor of one that finds others in their slots."""
    scheduler = scheduler_of(decoder)
    for request, expected in ((REQUESTS[0], [0]), (REQUESTS[2], [0, 1])):
        new = scheduler.submit(request)
        events = scheduler.advance()
        assert sorted({event.id for event in events}) == expected
        (first,) = [event for event in events if event.id == new]
        assert first.tokens == alone[(0, 2)[new]][0][:1]


def test_generate_and_the_scheduler_draw_alike(decoder, alone):
    model = decoder.layout.model(decoder.params)
    for request, (tokens, *_) in zip(REQUESTS, alone, strict=True):
        one = {"seed": request.seed, "row_ids": [request.row_id]}
        assert generate(model, [request.prompt], request.max_new_tokens, request.sampling, **one)[0].tolist() == tokens


def test_log_probabilities_are_those_of_the_models_own_distribution(decoder, alone):
    tokens, log_probs, *_ = alone[2]
    text = jax.numpy.asarray([[*REQUESTS[2].prompt, *tokens]])
    expected = jax.nn.log_softmax(nnx.jit(decoder.layout.model(decoder.params))(text)[0, 39:-1, :257])
    assert log_probs == pytest.approx(
        [float(row[token]) for row, token in zip(expected, tokens, strict=True)], abs=1e-4
    )


def test_the_likeliest_tokens_are_told_to_who_asks_for_them(decoder, alone):
    """Beside a request that does not, whose answer they do not change; the greedy token is the first of them."""
    asked = [dataclasses.replace(REQUESTS[number], top_log_probs=count) for number, count in ((2, 5), (1, 2))]
    scheduler, found = scheduler_of(decoder), [([], [], []) for _ in range(3)]
    for request in (*asked, REQUESTS[0]):
        scheduler.submit(request)
    for event in finished(scheduler):
        for kept, new in zip(found[event.id], (event.tokens, event.log_probs, event.top_log_probs), strict=True):
            kept += new
    (tokens, _, likely), (greedy, greedy_log_probs, two), (others, _, none) = found
    assert (tokens, greedy, others) == (alone[2][0], alone[1][0], alone[0][0]) and none == []
    assert [next(iter(top.items())) for top in two] == list(zip(greedy, greedy_log_probs, strict=True))
    text = jax.numpy.asarray([[*REQUESTS[2].prompt, *tokens]])
    logits = nnx.jit(decoder.layout.model(decoder.params))(text)[0, 39:-1, :257]
    values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), 5)
    assert [list(top) for top in likely] == ids.tolist()
    assert np.allclose([list(top.values()) for top in likely], values, atol=1e-4)


def test_all_tokens_of_a_small_vocabulary_are_told_once():
    scheduler = scheduler_of(random_decoder(LMConfig((LAYERS[0],), d_model=16, vocab_size=3)))
    scheduler.submit(Request([1], 3, top_log_probs=5))
    found = [top for event in finished(scheduler) for top in event.top_log_probs]
    assert [sorted(top) for top in found] == [[0, 1, 2]] * 3
    assert [sum(np.exp([*top.values()])) for top in found] == pytest.approx([1.0] * 3)


def test_stop_ids_end_a_request_and_are_left_out(decoder, alone):
    tokens = alone[0][0]
    stopping = Request([72, 105], 7, HOT, stop_ids=(tokens[5], tokens[3]), seed=3)
    found = answers(decoder, [stopping, REQUESTS[4]])
    first = min(tokens.index(stop) for stop in stopping.stop_ids)
    assert found[0][0] == tokens[:first] and len(found[0][1]) == first and found[0][3] == "stop"
    assert found[1][0] == alone[4][0]


def test_stop_strings_end_a_request_between_tokens_of_a_block(decoder):
    tokenizer, request = ByteTokenizer(), Request([72], 40, Sampling(1.0, top_k=100), seed=5)
    whole = answers(decoder, [request], tokenizer=tokenizer)[0]
    assert whole[2] == tokenizer.decode(whole[0])
    stop = whole[2][4:6]
    stopping = Request([72], 40, request.sampling, stop_strings=("never", stop), seed=5)
    tokens, log_probs, text, finish = answers(decoder, [stopping], tokenizer=tokenizer)[0]
    assert (text, finish) == (whole[2][: whole[2].index(stop)], "stop")
    assert stop in tokenizer.decode(tokens) and stop not in tokenizer.decode(tokens[:-1])
    assert tokens == whole[0][: len(tokens)]
    assert len(log_probs) == len(tokens)


def test_a_cancelled_request_leaves_its_slot_and_no_event(decoder, alone):
    scheduler = scheduler_of(decoder, prompt_tokens=1)
    first, second, third, fourth, fifth = (scheduler.submit(REQUESTS[i]) for i in (4, 2, 0, 3, 1))
    scheduler.advance()
    assert (scheduler.running, scheduler.waiting) == (1, 4)
    for id in (first, second, fourth):  # one that runs, one that is being read, one that waits
        assert scheduler.cancel(id) and not scheduler.cancel(id)
    found = collected(finished(scheduler))
    assert set(found) == {third, fifth}
    assert (found[third][0], found[fifth][0]) == (alone[0][0], alone[1][0])
    assert not scheduler.busy and (scheduler.running, scheduler.waiting) == (0, 0)


def test_a_stream_yields_tokens_before_the_last_is_drawn(decoder, alone):
    events = list(stream(decoder, REQUESTS, slots=2, block_tokens=3))
    assert [found[0] for _, found in sorted(collected(events).items())] == [tokens for tokens, *_ in alone]
    assert max(len(event.tokens) for event in events) == 3


def test_a_request_goes_on_from_a_state_as_from_its_tokens(decoder, alone):
    """Where it is read alone, in a batch, and by `generate`."""
    whole, (tokens, *_) = REQUESTS[2], alone[2]
    state = state_after(decoder, whole.prompt[:11])
    assert state_after(decoder, whole.prompt[9:11], state_after(decoder, whole.prompt[:9])).length == state.length == 11
    rest = dataclasses.replace(whole, prompt=whole.prompt[11:], state=state)
    found = answers(decoder, [REQUESTS[0], rest, rest], prefix_cache=PrefixCache(10**6))
    assert [found[number][0] for number in range(3)] == [alone[0][0], tokens, tokens]
    model, draws = decoder.layout.model(decoder.params), {"seed": rest.seed, "row_ids": [rest.row_id]}
    assert generate(model, [rest.prompt], 9, rest.sampling, **draws, state=state)[0].tolist() == tokens


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), r"^Prompt is empty; it needs at least one token\.$"),
        (Request([1], 64), r"^max_new_tokens is 64; the model reads 64 tokens"),
        (Request([1], 1, stop_ids=tuple(range(17))), r"^stop_ids has 17 ids; it has at most 16\.$"),
        (Request([1], 1, stop_ids=(257,)), r"^stop is 257; it is a token id, 0 to 256"),
        (Request([1], 1, stop_strings=("",)), r"^A stop string is ''; it is a text"),
        (Request([1], 1, stop_strings=("a",)), r"^stop_strings are found in text, and there is no tokenizer"),
        (Request([1], 1, seed=-1), r"^A seed is -1; it is an integer"),
        (
            Request([1], 1, state=State({}, (), 63, "other")),
            r"^The state has read 63 tokens; with a prompt and a new one",
        ),
        (
            Request([1, 2], 1, state=State({}, (), 62, "other")),
            r"^A prompt has 2 tokens; with one more it is at most the 2",
        ),
        (
            Request([1], 1, state=State({}, (), 9, "other")),
            r"^The state is of model other; this model is [0-9a-f]{32}, with its weights, dtype, flush",
        ),
        (Request([1], 1, state="kept"), r"^state is 'kept'; it is a State, as state_after returns it\.$"),
        (Request([1], 1, top_log_probs=6), r"^top_log_probs is 6; it is 0 to 5\.$"),
        (Request([1], 1, stop_ids=5), r"^stop_ids is 5; it is a tuple of token ids\.$"),
        (Request([1], 1, stop_strings="ab"), r"^stop_strings is 'ab'; it is a tuple of texts\.$"),
        ([1], r"^A request is \[1\]; it is a Request, as in Request\(\[72, 105\]\)\.$"),
    ],
)
def test_impossible_requests_are_refused(decoder, request_, message):
    with pytest.raises(UserError, match=message):
        scheduler_of(decoder).submit(request_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 1}, r"^max_len is 1; it is at least 2\.$"),
        ({"max_len": 10.5}, r"^max_len is 10\.5; it is at least 2\.$"),
        ({"slots": 1.5}, r"^slots is 1\.5; it is at least 1\.$"),
        ({"block_tokens": "8"}, r"^block_tokens is '8'; it is at least 1\.$"),
    ],
)
def test_impossible_numbers_of_a_scheduler_are_refused(decoder, options, message):
    with pytest.raises(UserError, match=message):
        scheduler_of(decoder, **options)


def test_a_stream_of_what_are_no_requests_is_refused(decoder):
    with pytest.raises(UserError, match=r"^A request is 72; it is a Request"):
        next(stream(decoder, [72]))


def test_a_prefix_that_is_read_at_once_is_compiled_for_and_may_stand_in_a_state():
    config = LMConfig((("prefix", {"num_heads": 2, "feature_dim": 4, "enc_length": 4}),), d_model=16, vocab_size=64)
    decoder = Decoder.of(nnx.jit(lambda: LM(config, rngs=nnx.Rngs(1)))())
    scheduler = Scheduler(decoder, slots=1, max_len=16)
    scheduler.compile()
    scheduler.submit(Request([7], 1, state=state_after(decoder, [1, 2, 3, 4])))
    assert scheduler.busy
    with pytest.raises(UserError, match=r"^The state has read 3 tokens; the model reads the first 4 together\.$"):
        scheduler.submit(Request([7], 1, state=state_after(decoder, [1, 2, 3])))


def test_a_rehearsal_changes_nothing_for_the_requests_that_have_slots(decoder, alone):
    scheduler = scheduler_of(decoder, slots=3, prefix_cache=PrefixCache(2**24))
    ids = [scheduler.submit(REQUESTS[i]) for i in (0, 2, 4)]
    events = scheduler.advance() + scheduler.advance()
    assert scheduler.running == 3
    rehearsal = scheduler.rehearse()
    while scheduler.busy:
        events += scheduler.advance()
    found = collected(events)
    assert len(found[rehearsal][0]) == 1
    for id, i in zip(ids, (0, 2, 4), strict=True):
        assert found[id][0] == alone[i][0]


def test_the_programs_that_are_compiled_ahead_are_those_that_run(decoder):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    jax.clear_caches()
    scheduler = scheduler_of(decoder, max_len=48, prefix_cache=PrefixCache(2**24))
    scheduler.compile()
    assert compiled
    compiled.clear()
    for length in (1, 7, 16, 17, 40):
        scheduler.submit(Request(list(range(1, length + 1)), 5, HOT))
    while scheduler.busy:
        scheduler.advance()
    assert not compiled

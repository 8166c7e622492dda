"""Drafted tokens: what is drawn is what would be without them, however many of them are right."""

import collections
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.cases import parametrize_some
from helpers.decoding import random_decoder
from helpers.small_mixers import SMALL

from based_jax.errors import UserError
from based_jax.generate import Drafts, Request, Sampling, Scheduler, state_after
from based_jax.generate.blocks import blocks
from based_jax.generate.drafts import UNKNOWN, Lookup
from based_jax.generate.rows import begun
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS

VOCAB, NEW, ROOM = 50, 14, 64
HOT = Sampling(temperature=1.0, top_k=20)
PROMPTS = [[7], [3, 1, 4, 1, 5, 3, 1], [i * 7 % VOCAB for i in range(37)]]
REQUESTS = [
    Request(prompt, NEW - i, sampling, seed=i) for sampling in (Sampling(), HOT) for i, prompt in enumerate(PROMPTS)
]


def decoder_of(*layers, seed=0, **options):
    config = LMConfig(layers=layers, d_model=16, dtype="float32", **{"vocab_size": VOCAB} | options)
    return random_decoder(config, seed)


def drawn(decoder, requests, drafts=None, steps=4):
    """Return the tokens of each request, and the blocks in which they were drawn."""
    rows = begun(decoder, requests, ROOM, chunk_tokens=16, drafts=drafts)
    found = list(blocks(decoder, rows, steps, drafts))
    parts = [[block.tokens[i, : block.drawn[i]] for block in found] for i in range(len(requests))]
    return [np.concatenate(of_row).tolist() for of_row in parts], found


def work(found):
    """Return steps, drawn and offered tokens of each row."""
    return [sum(getattr(block, name) for block in found) for name in ("steps", "drawn", "offered")]


LAYER = {kind: (kind, SMALL.get(kind, {})) for kind in MIXERS} | {
    "flush": ("taylor", SMALL["taylor"] | {"flush": 8}),
    "policy": ("attention", {"num_heads": 2, "cache_policy": "roco", "cache_budget": 24}),
}


@parametrize_some("kind", LAYER, ordinary=("flush",))
def test_drafts_change_no_token(kind):
    """Some are wrong, those of the model itself are all right."""
    decoder = decoder_of(LAYER[kind], ("conv", {}))
    expected, _ = drawn(decoder, REQUESTS)
    tokens, found = drawn(decoder, REQUESTS, Drafts.by_lookup(3))
    steps, count, offered = work(found)
    assert tokens == expected and np.array_equal(count, list(map(len, expected)))
    assert 0 <= (count - steps).sum() < offered.sum()
    tokens, found = drawn(decoder, REQUESTS, Drafts.by_model(decoder, 3))
    steps, count, _ = work(found)
    assert tokens == expected and np.array_equal(steps, -(-count // 4))


@pytest.mark.long
def test_a_model_that_is_nearly_the_same_is_right_now_and_then():
    decoder = decoder_of(("conv", {}), ("taylor", SMALL["taylor"]))
    noise = decoder_of(("conv", {}), ("taylor", SMALL["taylor"]), seed=1)
    near = jax.tree.map(lambda x, y: x + 0.1 * y, decoder.params, noise.params)
    expected, _ = drawn(decoder, REQUESTS)
    tokens, found = drawn(decoder, REQUESTS, Drafts.by_model(dataclasses.replace(decoder, params=near), 4))
    steps, count, offered = work(found)
    assert tokens == expected
    assert 0 < (count - steps)[:3].sum() < offered[:3].sum()
    assert 0 < (count - steps)[3:].sum() < offered[3:].sum()


def test_stacked_layers_keep_what_layers_apart_would():
    """Of each row another number of the tokens that it tried, as if the others had not been."""
    layers = (("conv", {}), ("taylor", SMALL["taylor"] | {"flush": 8}), ("window", SMALL["window"])) * 2
    config = LMConfig(layers=layers, d_model=16, vocab_size=VOCAB, dtype="float32", scan_layers=True, init_std=0.5)
    ids = np.random.default_rng().integers(VOCAB, size=(3, 11), dtype=np.int32)
    counts = np.asarray([0, 2, 4])

    @nnx.jit
    def tried_and_kept(ids, counts):
        model = LM(config, rngs=nnx.Rngs(0))
        hidden, cache = model.prefill(ids[:, :6], model.init_cache(3, 16))
        tried, trials = model.try_tokens(ids[:, 6:10], cache)
        last, _ = model.step(ids[:, 10], model.keep(trials, counts))
        return jnp.concatenate([hidden, tried], axis=1), last

    @nnx.jit
    def whole(ids):
        return LM(config, rngs=nnx.Rngs(0)).hidden(ids)

    hidden, last = tried_and_kept(ids, counts)
    np.testing.assert_allclose(hidden, whole(ids[:, :10]), atol=1e-4)
    for row, count in enumerate(counts):
        text = np.append(ids[row, : 6 + count], ids[row, 10])[None]
        text = np.pad(text, ((0, 0), (0, 11 - text.shape[1])))
        np.testing.assert_allclose(last[row], whole(text)[0, 6 + count], atol=1e-4)


def test_what_is_looked_up_is_what_followed_the_longest_and_latest_place():
    texts = [[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], [1, 2, 3], [7, 7, 7], [UNKNOWN, UNKNOWN, 5, 6, 5]]
    rows = types.SimpleNamespace(
        drafting=jnp.asarray([text + [UNKNOWN] * (12 - len(text)) for text in texts]),
        length=jnp.asarray(list(map(len, texts))),
    )
    ids, offered = Lookup(3).draft(None, rows)
    assert offered.tolist() == [3, 0, 3, 3]
    assert ids.tolist() == [[4, 9, 2], [0, 0, 0], [7, 7, 7], [6, 5, 6]]


def test_a_stop_ends_an_answer_within_what_was_drafted():
    """What stands behind it is drawn by none, and its neighbours go on."""
    decoder = decoder_of(("window", SMALL["window"]))
    [expected], _ = drawn(decoder, [Request([3, 1, 4], NEW)])
    stop = expected[5]
    end = expected.index(stop) + 1
    requests = [Request([3, 1, 4], NEW, stop_ids=(stop,)), Request([3, 1, 4], NEW), Request([3, 1, 4], 2)]
    tokens, found = drawn(decoder, requests, Drafts.by_model(decoder, 7))
    assert tokens == [expected[:end], expected, expected[:2]]
    assert work(found)[1].tolist() == [end, NEW, 2]


@pytest.mark.long
def test_requests_that_come_and_go_are_drafted_for():
    """In slots that others have left, behind states, by lookup and by a model, with the counts of each."""
    decoder = decoder_of(("conv", {}), ("taylor", SMALL["taylor"] | {"flush": 8}))
    state = state_after(decoder, [9, 8, 7])
    requests = [*REQUESTS, Request([3, 1], NEW, state=state, top_log_probs=2)]
    for drafts in (None, Drafts.by_lookup(3), Drafts.by_model(decoder, 3)):
        scheduler = Scheduler(decoder, slots=2, max_len=ROOM, block_tokens=2, chunk_tokens=16, drafts=drafts)
        ids = [scheduler.submit(request) for request in requests]
        events = collections.defaultdict(list)
        while scheduler.busy:
            for event in scheduler.advance():
                events[event.id].append(event)
        found = [[token for event in events[id] for token in event.tokens] for id in ids]
        if drafts is None:
            expected = found
        works = [[event.work for event in events[id]] for id in ids]
        assert found == expected
        for tokens, of_request in zip(found, works, strict=True):
            assert sum(work.drawn for work in of_request) == len(tokens)
            accepted, offered = sum(work.accepted for work in of_request), sum(work.offered for work in of_request)
            assert 0 <= accepted <= offered and (drafts is not None or offered == 0)


def test_drafts_that_are_none_are_refused():
    decoder, other = decoder_of(("conv", {})), decoder_of(("conv", {}), vocab_size=51)
    for tokens in (0, 33, True, "4"):
        with pytest.raises(UserError, match=r"tokens are to be drafted at once; 1 to 32 can be\.$"):
            Drafts.by_lookup(tokens)
    short = decoder_of(("long_conv", {"l_max": 8}))
    refused = {
        "The model that drafts knows 51 tokens, and the model that it drafts for 50": Drafts.by_model(other, 2),
        "The model that drafts reads 8 tokens; 64 are to be read": Drafts.by_model(short, 2),
        "drafts is 4; it is None or Drafts, as in Drafts.by_lookup": 4,
    }
    for sentence, drafts in refused.items():
        with pytest.raises(UserError, match=f"^{sentence}"):
            Scheduler(decoder, slots=1, max_len=ROOM, drafts=drafts)
    with pytest.raises(UserError, match=r"^4 tokens are drafted and 5 read at once; there is room for 4\.$"):
        Scheduler(decoder, slots=1, max_len=4, drafts=Drafts.by_lookup(4))

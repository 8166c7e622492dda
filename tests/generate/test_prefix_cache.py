"""What a prompt shares with those before it is not read again."""

import numpy as np
import pytest
from helpers.decoding import random_decoder

from based_jax.errors import UserError
from based_jax.generate import Request, Scheduler
from based_jax.generate.intake import piece_ends
from based_jax.generate.prefix_cache import (
    BLOCK_TOKENS,
    EVICTED,
    NEVER_SEEN,
    NOT_KEPT,
    OTHER_MODEL,
    REASONS,
    TOO_LARGE,
    TOO_SHORT,
    PrefixCache,
)
from based_jax.generate.state import State
from based_jax.generate.state_layout import StateLayout
from based_jax.nn.lm import LMConfig

CHUNK, STATE_BYTES, PLENTY = 512, 8, 10**6


def state_of(ids, model="model", elements=1):
    """Return a state that says which tokens it has read."""
    return State({"layers/0/state": np.full(elements, hash(bytes(ids)))}, ("taylor",), len(ids), model)


def read(cache, ids, model="model"):
    """Read a prompt as the scheduler does; return what was found of it."""
    found = cache.lookup(ids, model)
    for end in piece_ends(0 if found.state is None else found.state.length, len(ids), CHUNK, found.marks):
        cache.keep(ids[:end], state_of(ids[:end], model))
    return found


def prompt(rng, length, prefix=()):
    """Return a prompt that begins with another and goes on otherwise than it."""
    return np.concatenate([np.asarray(prefix, np.int32), 1000 + rng.integers(0, 10**6, length - len(prefix), np.int32)])


@pytest.mark.parametrize(
    ("shared", "second", "third"),
    [(15, 0, 0), (16, 16, 16), (37, 16, 32), (511, 16, 496), (512, 512, 512), (1500, 1024, 1488), (4000, 4000, 4000)],
)
def test_prompts_that_share_tokens_have_them_restored(shared, second, third, rng):
    """Of a prompt of 4,000, by the second that begins like it and by the third."""
    cache, first = PrefixCache(PLENTY), prompt(rng, 4000)
    assert read(cache, first).miss == NEVER_SEEN
    for restored in (second, third):
        ids = prompt(rng, 4100, first[:shared])
        found = read(cache, ids)
        assert (0 if found.state is None else found.state.length) == restored
        assert found.state is None or found.state == state_of(ids[:restored])
    assert cache.lookup(first, "model").state == state_of(first)


def test_any_prompts_are_found_as_a_list_of_all_states_finds_them(rng):
    """Prompts of two words of 16 tokens and a rest, in a budget for seven states, which leave by their last use."""
    cache, kept = PrefixCache(7 * STATE_BYTES), []  # the list has the last used at its end
    for _ in range(400):
        words = [np.full(BLOCK_TOKENS, word, np.int32) for word in rng.integers(0, 2, rng.integers(0, 4))]
        ids = np.concatenate([*words, np.full(rng.integers(0, BLOCK_TOKENS), 7, np.int32)], dtype=np.int32)
        prefixes = [old for old in kept if old == ids[: len(old)].tolist()]
        found = cache.lookup(ids, "model")
        if prefixes:
            longest = max(prefixes, key=len)
            assert found.state == state_of(np.asarray(longest, np.int32)) and found.miss is None
            kept.append(kept.pop(kept.index(longest)))
        else:
            assert found.state is None and found.miss in REASONS
        cache.keep(ids, state_of(ids))
        if len(ids) >= BLOCK_TOKENS:
            kept = [*(old for old in kept if old != ids.tolist()), ids.tolist()][-7:]
        assert (cache.metrics.states, cache.metrics.bytes) == (len(kept), STATE_BYTES * len(kept))
    assert cache.metrics.kept == cache.metrics.states + cache.metrics.evicted
    assert cache.metrics.lookups == cache.metrics.hits + sum(cache.metrics.misses.values())


def test_every_miss_has_its_reason(rng):
    cache, first = PrefixCache(2 * STATE_BYTES), prompt(rng, 40)
    assert cache.lookup(first[:15], "model").miss == TOO_SHORT
    assert cache.lookup(first, "model").miss == NEVER_SEEN
    cache.keep(first, state_of(first))
    assert cache.lookup(prompt(rng, 40, first[:37]), "model").miss == NOT_KEPT
    assert cache.lookup(first, "another").miss == OTHER_MODEL
    for other in (prompt(rng, 40), prompt(rng, 40)):
        cache.keep(other, state_of(other))
    assert cache.lookup(first, "model").miss == EVICTED
    large = prompt(rng, 40)
    cache.keep(large, state_of(large, elements=3))
    assert cache.lookup(large, "model").miss == TOO_LARGE
    expected = dict.fromkeys(REASONS, 1)
    assert cache.metrics.misses == expected and cache.metrics.hits == 0


def test_what_leads_to_no_state_is_forgotten(rng):
    cache = PrefixCache(3 * STATE_BYTES)
    for _ in range(20):
        read(cache, prompt(rng, 1000))
    nodes, waiting = 0, list(cache._roots.values())
    while waiting:
        node = waiting.pop()
        nodes += 1
        waiting += node.children.values()
    assert nodes == 1 + 1000 // BLOCK_TOKENS


def test_a_budget_of_nothing_and_a_state_of_other_tokens_are_refused():
    with pytest.raises(UserError, match=r"^The budget of a prefix cache is 0 bytes; it is at least 1\.$"):
        PrefixCache(0)
    with pytest.raises(UserError, match=r"^The budget of a prefix cache is '1G' bytes; it is at least 1\.$"):
        PrefixCache("1G")
    with pytest.raises(UserError, match=r"^The state of 20 tokens has read 16\.$"):
        PrefixCache(1).keep(np.arange(20, dtype=np.int32), state_of(np.arange(16, dtype=np.int32)))


@pytest.fixture(scope="module")
def decoder():
    """Return a model of `test_scheduler.py`'s config, whose programs it shares."""
    layers = (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}), ("window", {"num_heads": 2, "window": 4}))
    return random_decoder(LMConfig(layers=layers, d_model=16, vocab_size=257, dtype="float32", init_std=0.5))


def answer(decoder, prompt, prefix_cache=None):
    """Return the tokens that a scheduler with chunks of 32 draws, greedily."""
    scheduler = Scheduler(decoder, slots=2, max_len=128, chunk_tokens=32, block_tokens=3, prefix_cache=prefix_cache)
    scheduler.submit(Request(prompt, 4))
    tokens = []
    while scheduler.busy:
        tokens += [token for event in scheduler.advance() for token in event.tokens]
    return tokens


def test_a_scheduler_answers_from_restored_states_as_without_them(decoder, rng, monkeypatch):
    cache, first = PrefixCache(PLENTY), rng.integers(0, 257, 90, np.int32)
    prompts = [first, first, np.concatenate([first[:53], first[:30]]), np.concatenate([first[:53], first[:10]])]
    restored = []
    for ids in prompts:
        before = cache.metrics.tokens_restored
        assert answer(decoder, ids, cache) == answer(decoder, ids)
        restored.append(cache.metrics.tokens_restored - before)
    assert restored == [0, 89, 32, 48]
    assert cache.metrics.misses[NEVER_SEEN] == 1 and cache.metrics.hits == 3
    kept = cache.lookup(first[:89], decoder.fingerprint).state
    monkeypatch.setattr(StateLayout, "put", None)  # a prompt of which all is kept goes to its slot at once
    assert answer(decoder, first, cache) == answer(decoder, first)
    assert cache.lookup(first[:89], decoder.fingerprint).state == kept  # what went on from it left no trace


def test_prompts_that_come_together_wait_for_what_they_share(decoder, rng):
    """The second goes on from the last chunk that it shares with the first, the others from all that they share."""
    shared = rng.integers(0, 257, 70, np.int32)
    prompts = [np.append(shared, rng.integers(0, 257, length, np.int32)) for length in (20, 1, 9, 9)]
    cache = PrefixCache(PLENTY)
    scheduler = Scheduler(decoder, slots=4, max_len=128, chunk_tokens=32, block_tokens=3, prefix_cache=cache)
    for ids in prompts:
        scheduler.submit(Request(ids, 4))
    tokens = {number: [] for number in range(4)}
    while scheduler.busy:
        for event in scheduler.advance():
            tokens[event.id] += event.tokens
    assert cache.metrics.tokens_restored == 64 + 70 + 70
    assert list(tokens.values()) == [answer(decoder, ids) for ids in prompts]

"""The experiments on states, with small models."""

import numpy as np
import pytest
from helpers.decoding import random_decoder

from based_jax.nn.lm import LMConfig
from experiments.prefix_cache import __main__ as prefix_cache
from experiments.state_addition import __main__ as state_addition

LAYERS = (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}), ("window", {"num_heads": 2, "window": 4}))

pytestmark = pytest.mark.long


def small_decoder(layers=LAYERS):
    return random_decoder(LMConfig(layers=layers, d_model=16, vocab_size=257, dtype="float32"))


def test_prompts_of_each_kind_have_restored_what_they_share(monkeypatch):
    monkeypatch.setattr(prefix_cache, "PROMPT_TOKENS", 600)
    monkeypatch.setattr(prefix_cache, "SHARED_TOKENS", 580)
    found = {row["prompt"]: row["restored"] for row in prefix_cache.measure(small_decoder(), repeats=1)}
    shares = {"second to share 580": 512, "third to share 580": 576}
    assert found == {"new, no cache": 0, "new": 0, "the same again": 599, **shares}


def test_what_reading_in_pieces_is_off_by_is_measured_on_what_follows():
    rng, decoder = np.random.default_rng(0), small_decoder(2 * LAYERS[:2])
    contexts, rest = rng.integers(0, 257, (3, 32)), rng.integers(0, 257, (3, 8))
    rows = list(state_addition.measure(decoder, contexts, rest, rng.integers(0, 257, rest.shape)))
    assert [row["reading"] for row in rows].count("pieces") == 9 and len(rows) == 13
    exact = [row["off"] for row in rows if row.get("overlap", 0) >= 2]
    assert all(off["layers[1]"] < 1e-6 < 1e-3 < off["layers[3]"] for off in exact)
    losses = {row["reading"]: row["loss"] for row in rows}
    assert len(set(losses.values())) == 3 and all(0 < loss < 100 for loss in losses.values())

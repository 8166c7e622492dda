"""Attention whose parameters become those of a window."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.random_models import filled

from based_jax.convert import taylor_window_from_attention, window_from_attention
from based_jax.convert.reference import reference_weights
from based_jax.errors import UserError
from based_jax.nn.lm import LM, LMConfig

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": True, "rotary_base": 100.0}
LAYERS = (("attention", HEADS), ("attention", HEADS), ("conv", {}))


@pytest.fixture
def model(rng):
    config = LMConfig(LAYERS, d_model=16, vocab_size=11, dtype="float32", mlp="none")
    return filled(lambda: LM(config, rngs=nnx.Rngs(0)), rng, 0.3)


logits = jax.jit(lambda model, ids: model(ids))


def test_tokens_within_the_window_see_what_they_saw(model, rng, close):
    """Rotary's share is attention's own default, half of a head, not the window's."""
    ids = rng.integers(0, 11, (2, 9))
    windowed = window_from_attention(model, 5, layers=[0])
    assert [kind for kind, _ in windowed.config.layers] == ["window", "attention", "conv"]
    ours, theirs = logits(windowed, ids), logits(model, ids)
    close(ours[:, :5], theirs[:, :5])
    assert np.abs(ours - theirs)[:, -1].max() > 1e-2


def test_the_parameters_are_those_of_the_model(model):
    windowed = window_from_attention(model, 5)
    assert windowed.config.layers[0][1] == HEADS | {"rotary_fraction": 0.5, "window": 5}
    ours, theirs = (reference_weights(each, "based_jax") for each in (windowed, model))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(array, theirs[key]) for key, array in ours.items())


def test_other_layers_are_refused(model):
    for layers, message in (([2], r"layers has 2; the layers of attention are \[0, 1\]"), ([4], "layers has 4")):
        with pytest.raises(UserError, match=message):
            window_from_attention(model, 5, layers)
    with pytest.raises(UserError, match="window is 0; it is at least 1"):
        window_from_attention(model, 0)


def test_sinks_are_all_that_tokens_miss_of_a_long_window(model, rng, close):
    ids = rng.integers(0, 11, (2, 9))
    whole = logits(model, ids)
    close(logits(window_from_attention(model, 5, sinks=4), ids), whole)
    assert np.abs(logits(window_from_attention(model, 5, sinks=3), ids) - whole)[:, -1].max() > 1e-3


def test_taylor_attention_beside_a_window_keeps_the_models_parameters(model, rng, close):
    """With gates that are shut it is the window alone."""
    made = taylor_window_from_attention(model, 5, 3, layers=[1], sinks=1)
    assert made.config.layers[1] == (
        "taylor_window",
        HEADS | {"rotary_fraction": 0.5, "window": 5, "feature_dim": 3, "sinks": 1},
    )
    ours, theirs = (reference_weights(each, "based_jax") for each in (made, model))
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
    ids = rng.integers(0, 11, (2, 9))
    windowed = logits(window_from_attention(model, 5, layers=[1], sinks=1), ids)
    assert np.abs(logits(made, ids) - windowed).max() > 1e-4
    made.stacks[1].blocks[0].mixer.gate.bias[...] -= 100.0
    close(logits(made, ids), windowed)

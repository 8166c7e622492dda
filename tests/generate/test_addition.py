"""States of pieces against one reading: equal where the keys and values are, and measured where not."""

import types

import jax
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.decoding import random_decoder

from based_jax.errors import UserError
from based_jax.generate.addition import add, prefill_in_pieces
from based_jax.generate.prefill import prefill
from based_jax.generate.state_layout import StateLayout, state_after
from based_jax.nn.feature_maps import FEATURE_MAPS
from based_jax.nn.lm import LMConfig

VOCAB, T = 50, 44
TAYLOR = ("taylor", {"num_heads": 2, "feature_dim": 4})
WINDOW = ("window", {"num_heads": 2, "window": 4})


def decoder_of(*layers):
    return random_decoder(LMConfig(layers=layers, d_model=16, vocab_size=VOCAB, dtype="float32"))


def distance(state, other, layer):
    """Return how far the sums of a layer are from another state's, relative to their norm."""
    ours, theirs = (np.asarray(max(x.layer(layer).values(), key=np.size), np.float64) for x in (state, other))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


MAPS = [{"feature_map": name, "num_heads": 2, "feature_dim": 4} for name in sorted(FEATURE_MAPS)]
COSFORMER = ("linear", {"feature_map": "cosformer", "num_heads": 2, "feature_dim": 4})


@parametrize_some("layer", [TAYLOR, *(("linear", options) for options in MAPS)], ordinary=[COSFORMER], ids=str)
def test_a_linear_layers_sums_are_those_of_one_reading(layer, rng):
    """Of a first layer, whose keys and values are of the tokens alone, and in cosformer of their places too."""
    decoder, ids = decoder_of(layer), rng.integers(0, VOCAB, T)
    whole = state_after(decoder, ids)
    for pieces in (1, 4):
        added = prefill_in_pieces(decoder, ids, pieces)
        assert added.length == T and distance(added, whole, 0) < 1e-6


@pytest.fixture(scope="module")
def based():
    """Return a model whose first Taylor layer is behind a convolution, and whose second is behind all kinds."""
    return decoder_of(("conv", {}), TAYLOR, WINDOW, TAYLOR)


def test_an_overlap_makes_the_first_linear_layer_exact_and_no_deeper_one(based, rng):
    """The convolution has three taps, so that it sees two tokens to the left."""
    ids = rng.integers(0, VOCAB, T)
    whole = state_after(based, ids)
    apart, overlapping = (prefill_in_pieces(based, ids, 4, overlap=overlap) for overlap in (0, 2))
    assert distance(overlapping, whole, 1) < 1e-6 and 1e-3 < distance(apart, whole, 1) < 0.5
    assert 1e-3 < distance(overlapping, whole, 3) < 0.5 and 1e-3 < distance(apart, whole, 3) < 0.5


def test_states_of_documents_add_to_that_of_pieces_and_keep_the_last_ones_recent_tokens(based, close, rng):
    ids = rng.integers(0, VOCAB, T)
    states = [state_after(based, part) for part in np.array_split(ids, 4)]
    added, at_once = add(based, states), prefill_in_pieces(based, ids, 4)
    close(added.arrays, at_once.arrays)
    assert added.length == at_once.length == T
    for layer in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, added.layer(layer), states[-1].layer(layer))
    layout = StateLayout(based)
    after = layout.take(prefill(based, layout.fork(added, 1), [ids[:7]]), T + 7)
    window = layout.take(prefill(based, layout.fork(states[-1], 1), [ids[:7]]), 18)
    close(after.layer(0), window.layer(0))  # what follows follows the last document


def test_what_does_not_add_is_refused(based):
    with pytest.raises(UserError, match=r"^pieces is 4; a context of 3 tokens has 1 to 3\.$"):
        prefill_in_pieces(based, [1, 2, 3], 4)
    with pytest.raises(UserError, match=r"^overlap is -1; it is at least 0\.$"):
        prefill_in_pieces(based, [1, 2, 3], 1, overlap=-1)
    with pytest.raises(UserError, match=r"^There is no state to add; give at least one\.$"):
        add(based, [])
    mamba = types.SimpleNamespace(config=LMConfig(layers=(("conv", {}), ("mamba", {})), d_model=16))
    with pytest.raises(
        UserError, match=r"^layers\[1\] is 'mamba', whose states do not add; those of taylor, linear do"
    ):
        prefill_in_pieces(mamba, [1, 2, 3], 2)

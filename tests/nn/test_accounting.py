"""Bytes of state as publications count them, and every mixer's beside those of its cache."""

import re

import jax
import pytest
from flax import nnx

from based_jax.errors import UserError
from based_jax.nn.accounting import state_bytes, state_elements
from based_jax.nn.mixers import MIXERS, make_mixer
from based_jax.nn.names import FAMILY_NAMES

CONV = ("base_conv", {})
D, T = 128, 64
OPTIONS = {"hgrn2": {"expand_ratio": 32}, "taylor": {"num_heads": 2}, "prefix": {"num_heads": 2}}

# What decoding keeps of a layer of width D and the publications do not count, in units of D.
BESIDE = {
    "deltanet": 4 * 3,
    "gated_deltanet": 4 * 4,
    "h3": 64,
    "hyena": 3 * 3,
    "kda": 4 * 3 * 8,
    "mamba": 4 * 2,
    "mamba2": 4 * (2 + 2),
    "rwkv4": 1,
    "rwkv5": 1,
    "rwkv6": 1,
    "rwkv7": 1,
    "simple_gla": 4 * 3,
    "taylor_window": 2,
    "window": 2,
}


def both(layers, d_model):
    """Return the bytes at 1,024 tokens without and with the convolution."""
    return tuple(state_bytes(layers, d_model, 1024, convolution=counted) for counted in (False, True))


@pytest.mark.parametrize(
    ("d_model", "feature_dim", "main", "whole"),
    [
        (64, 8, 11_700, 12_468),
        (64, 16, 39_780, 40_548),
        (64, 24, 84_500, 85_268),
        (128, 8, 23_220, 24_756),
        (128, 16, 78_948, 80_484),
        (128, 24, 167_700, 169_236),
        (48, 8, 8_820, 9_396),
        (48, 16, 29_988, 30_564),
        (48, 24, 63_700, 64_276),
    ],
)
def test_based_has_the_bytes_of_the_reference(d_model, feature_dim, main, whole):
    layers = [CONV, ("taylor", {"num_heads": 1, "feature_dim": feature_dim})]
    assert both(layers, d_model) == (main, whole)


@pytest.mark.parametrize(
    ("kind", "options", "d_model", "main", "whole"),
    [
        ("deltanet", {"num_heads": 2}, 128, 32_768, 34_304),
        ("gla", {"num_heads": 2}, 64, 4_096, 4_864),
        ("rwkv7", {}, 256, 65_536, 68_608),
        ("window", {"window": 9}, 128, 8_192, 9_728),
        ("attention", {"num_heads": 2}, 64, 524_288, 525_056),
    ],
)
def test_hybrids_have_the_bytes_of_the_reference(kind, options, d_model, main, whole):
    assert both([CONV, (kind, options)], d_model) == (main, whole)


@pytest.mark.parametrize(
    ("kind", "options", "d_model", "size"),
    [
        ("mamba", {"d_state": 8}, 64, 1 << 13),
        ("mamba", {"d_state": 16}, 64, 16_384),
        ("mamba", {"d_state": 24}, 64, 24_576),
        ("mamba2", {"d_state": 24}, 128, 49_152),
        ("mamba2", {"d_state": 24}, 256, 98_304),
        ("hyena", {}, 64, 1 << 19),
        ("hyena", {}, 512, 1 << 22),
        ("h3", {"d_state": 16}, 64, 1 << 13),
    ],
)
def test_two_layers_of_one_mixer_both_count(kind, options, d_model, size):
    assert both([(kind, options)] * 2, d_model) == (size, size)


def test_every_mixer_has_a_name():
    assert FAMILY_NAMES.keys() == MIXERS.keys()


@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_counts_its_cache_but_for_what_stands_here(kind):
    options = OPTIONS.get(kind, {})
    mixer = nnx.eval_shape(lambda: make_mixer(kind, D, rngs=nnx.Rngs(0), **options))
    cache = mixer.state_size(T)
    assert state_elements([(kind, options)], D, T, convolution=False) == cache - BESIDE.get(kind, 0) * D
    assert mixer.published_state_size(T) == cache - BESIDE.get(kind, 0) * D


def test_gla_counts_its_own_convolution_as_zoology_does():
    layers = [("gla", {"conv_size": 4})]
    mixer = nnx.eval_shape(lambda: make_mixer("gla", D, rngs=nnx.Rngs(0), conv_size=4))
    assert state_elements(layers, D, T, convolution=False) == mixer.state_size(T)


@pytest.mark.parametrize("name", ["elu", "cosformer", "performer", "hedgehog"])
def test_linear_attention_counts_the_features_of_its_map(name):
    options = {"num_heads": 2, "feature_map": name}
    mixer = make_mixer("linear", D, rngs=nnx.Rngs(0), **options)
    held = jax.tree.leaves(mixer.init_cache(1, T))[0].size
    assert state_elements([("linear", options)], D, T, convolution=False) == held


def test_grouped_heads_keep_fewer_keys():
    layers = [("attention", {"num_heads": 4, "num_kv_heads": 1})]
    assert state_elements(layers, D, T, convolution=False) == 2 * D * T // 4


def test_convolutions_alone_count_whole():
    assert both([CONV, CONV], 64) == (2 * 768, 2 * 768)


@pytest.mark.parametrize(
    ("layers", "d_model", "seq_len", "message"),
    [
        ([], 64, 8, "layers is empty"),
        ([("taylr", {})], 64, 8, "did you mean 'taylor'"),
        ([("taylor", {"heads": 1})], 64, 8, "option of mixer 'taylor' 'heads'"),
        ([("deltanet", {"num_heads": 3})], 64, 8, "cannot be divided into 3 heads"),
        ([("taylor", {"num_heads": 3})], 64, 8, "3"),
        ([CONV], 0, 8, "d_model is 0"),
        ([CONV], 64, 0, "seq_len is 0"),
    ],
)
def test_impossible_input_is_one_sentence(layers, d_model, seq_len, message):
    with pytest.raises(UserError, match=re.escape(message)):
        state_elements(layers, d_model, seq_len, convolution=True)

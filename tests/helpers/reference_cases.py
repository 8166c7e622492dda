"""The arrays of tests/parity, computed by public PyTorch code (a file's `meta` names it), and how close is equal."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from based_jax.convert import window_from_based
from based_jax.nn.lm import LMConfig

FOLDER = Path(__file__).parents[1] / "parity"
POINTWISE, FORWARD, GRADIENT, LOGITS = 1e-6, 1e-5, 1e-4, 5e-5

LMS = {
    "tiny_based_lm": LMConfig(
        (
            ("conv", {}),
            ("taylor", {"num_heads": 4, "feature_dim": 16}),
            ("window", {"num_heads": 4, "window": window_from_based(16)}),
        )
        * 2,
        d_model=64,
        vocab_size=97,
        mlp_dim=256,
        dtype="float32",
    ),
    "tiny_attn_lm_even": LMConfig(
        (("attention", {"num_heads": 4}),) * 3,
        d_model=64,
        vocab_size=97,
        pad_vocab_multiple=16,
        mlp_dim=256,
        dtype="float32",
    ),
    "hf_llama_a": LMConfig(
        (("attention", {"num_heads": 4, "num_kv_heads": 2, "rotary_fraction": 1.0}),) * 2,
        d_model=32,
        vocab_size=61,
        pad_vocab_multiple=1,
        mlp_dim=64,
        tie_embeddings=False,
        dtype="float32",
    ),
    "tiny_mamba_lm": LMConfig(
        (("mamba", {}),) * 3, d_model=32, vocab_size=97, pad_vocab_multiple=16, mlp="none", dtype="float32"
    ),
    "hf_mamba_a": LMConfig(
        (("mamba", {"d_state": 8}),) * 2,
        d_model=32,
        vocab_size=61,
        pad_vocab_multiple=1,
        mlp="none",
        dtype="float32",
    ),
    "hf_rwkv4_lm_a": LMConfig(
        (("rwkv4", {}), ("rwkv4_channel_mix", {"expand": 2.0})) * 2,
        d_model=32,
        vocab_size=61,
        pad_vocab_multiple=1,
        mlp="none",
        norm="layer",
        embed_norm=True,
        tie_embeddings=False,
        dtype="float32",
    ),
    "zoology_lm_based": LMConfig(
        (("base_conv", {}), ("taylor", {"num_heads": 1, "feature_dim": 8})),
        d_model=32,
        vocab_size=128,
        mlp="identity",
        norm="layer",
        dtype="float32",
    ),
}
LMS["zoology_lm_based_mlp"] = dataclasses.replace(LMS["zoology_lm_based"], mlp="gelu", mlp_dim=128)
"""The models of whole files."""


class Case(NamedTuple):
    """The arrays of a file by group, `trained` the weights after twenty steps of training, and its description."""

    inputs: dict[str, Any]
    weights: dict[str, Any]
    outputs: dict[str, Any]
    gradients: dict[str, Any]
    trained: dict[str, Any]
    meta: dict[str, Any]


def load(*names):
    """Return one case from the files that hold its parts."""
    arrays = {}
    for name in names:
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            arrays |= dict(file)
    groups = ("in.", "w.", "out.", "grad.", "after20.")
    split = [{k.removeprefix(group): v for k, v in arrays.items() if k.startswith(group)} for group in groups]
    return Case(*split, json.loads(str(arrays["meta"])))


def assert_close(ours, reference, tolerance, what=""):
    """Bound the largest error relative to max(1, max|reference|)."""
    assert ours.shape == reference.shape, what
    error = np.abs(np.asarray(ours, np.float64) - reference).max() / max(1.0, np.abs(reference).max())
    assert error <= tolerance, f"{what}: relative error {error:.2e} is above {tolerance:.0e}"


def assert_gradients(ours, reference):
    """Compare parameters' gradients with the reference's, which a module holds as if they were its weights."""
    assert_parameters(ours, reference, lambda path: GRADIENT)


def assert_parameters(ours, reference, tolerance):
    """Compare a state, parameter by parameter, with what a module holds; the tolerance follows from the path."""
    wanted = dict(nnx.to_flat_state(nnx.state(reference, nnx.Param)))
    ours = dict(nnx.to_flat_state(ours))
    assert ours.keys() == wanted.keys()
    for path, leaf in ours.items():
        assert_close(leaf[...], np.asarray(wanted[path][...]), tolerance(path), f"{path}")


def assert_taylor_state(state, kv, k):
    """Compare our state (B, H, E, V+1) with kv (B, H, 1, V, E') and k (B, H, 1, 1, E') over all 1 + K + K^2 features.

    The reference's x_m x_n and x_n x_m carry 1/sqrt(2) each, our one product of two components the whole.
    """
    feature_dim = int(np.sqrt(k.shape[-1] - 1))
    m, n = np.tril_indices(feature_dim)
    shares = np.where(m == n, 1.0, np.sqrt(0.5))
    linear, quadratic = np.split(np.moveaxis(np.asarray(state), 2, 3), [1 + feature_dim], axis=-1)
    products = np.zeros((*linear.shape[:-1], feature_dim, feature_dim))
    products[..., m, n] = products[..., n, m] = quadratic * shares
    full = np.concatenate([linear, products.reshape(*linear.shape[:-1], -1)], axis=-1)[:, :, None]
    assert_close(full[..., :-1, :], kv, FORWARD, "kv_state")
    assert_close(full[..., -1:, :], k, FORWARD, "k_state")

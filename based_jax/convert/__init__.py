"""Weights from the reference implementations, and to them."""

from based_jax.convert.arrays import save_orbax, save_safetensors
from based_jax.convert.hf import hf_config, load_hf, save_hf
from based_jax.convert.reference import (
    lm_from_reference,
    mixer_from_reference,
    reference_weights,
    window_from_based,
    window_from_zoology,
)
from based_jax.convert.swapped import taylor_window_from_attention, window_from_attention

__all__ = [
    "hf_config",
    "lm_from_reference",
    "load_hf",
    "mixer_from_reference",
    "reference_weights",
    "save_hf",
    "save_orbax",
    "save_safetensors",
    "taylor_window_from_attention",
    "window_from_attention",
    "window_from_based",
    "window_from_zoology",
]

"""Scalings of rotary's frequencies for long texts (transformers:modeling_rope_utils.py)."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.errors import UserError, unknown
from based_jax.nn.mixer import check_positive

Frequencies = Float[Array, "_"]


def unscaled(frequencies: Frequencies, config: Any) -> Frequencies:
    """Return the frequencies as they are."""
    return frequencies


def linear(frequencies: Frequencies, config: Any) -> Frequencies:
    """Return all of them over `rotary_factor`, as if places stood closer together (arXiv 2306.15595)."""
    return frequencies / config.rotary_factor


def llama3(frequencies: Frequencies, config: Any) -> Frequencies:
    """Return those of less than `rotary_low_freq_factor` turns in `rotary_original_len` tokens over `rotary_factor`.

    Those of more than `rotary_high_freq_factor` turns stay, and between them it goes over (Llama 3.1).
    """
    low, high = config.rotary_low_freq_factor, config.rotary_high_freq_factor
    turns = config.rotary_original_len * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / config.rotary_factor


SCALINGS: dict[str, Callable[[Frequencies, Any], Frequencies]] = {"none": unscaled, "linear": linear, "llama3": llama3}
"""By the option `rotary_scaling`."""


def scaling(config: Any) -> Callable[[Frequencies], Frequencies]:
    """Return what a mixer's options make of the frequencies."""
    return lambda frequencies: SCALINGS[config.rotary_scaling](frequencies, config)


def check_scaling(config: Any) -> None:
    """Raise UserError for options of a scaling that does not exist, or that would speed rotary up."""
    if config.rotary_scaling not in SCALINGS:
        raise unknown("rotary_scaling", config.rotary_scaling, SCALINGS)
    check_positive(config, "rotary_factor", "rotary_low_freq_factor", "rotary_high_freq_factor")
    if config.rotary_factor < 1:
        raise UserError(f"rotary_factor is {config.rotary_factor}; it is at least 1.")
    if config.rotary_low_freq_factor >= config.rotary_high_freq_factor:
        raise UserError(
            f"rotary_low_freq_factor is {config.rotary_low_freq_factor}; it is below rotary_high_freq_factor,"
            f" {config.rotary_high_freq_factor}."
        )

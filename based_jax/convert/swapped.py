"""Models of the same parameters with other layers."""

import dataclasses
from collections.abc import Collection
from typing import Any

from based_jax.convert.reference import lm_from_reference, reference_weights
from based_jax.convert.skeletons import OWN
from based_jax.errors import UserError
from based_jax.nn.lm import LM
from based_jax.nn.mixers.attention import AttentionConfig, HeadsConfig
from based_jax.nn.mixers.window import WindowConfig

SHARED_OPTIONS = {field.name for field in dataclasses.fields(HeadsConfig)} - {"impl"}


def window_from_attention(model: LM, window: int, layers: Collection[int] | None = None) -> LM:
    """Return a model in which attention sees a window, its parameters those of the model.

    Args:
      model: with layers of `attention`.
      window: the keys that a query sees, its own included.
      layers: the numbers of the layers that change; None for all of `attention`.

    Raises:
      UserError: a layer is none of attention, or the window is impossible.
    """
    kinds = [kind for kind, _ in model.config.layers]
    chosen = [i for i, kind in enumerate(kinds) if kind == "attention"] if layers is None else sorted(layers)
    for i in chosen:
        if not 0 <= i < len(kinds) or kinds[i] != "attention":
            known = [i for i, kind in enumerate(kinds) if kind == "attention"]
            raise UserError(f"layers has {i}; the layers of attention are {known}.")
    swapped = tuple(
        ("window", _window_options(options, window)) if i in chosen else (kind, options)
        for i, (kind, options) in enumerate(model.config.layers)
    )
    return lm_from_reference(reference_weights(model, OWN), dataclasses.replace(model.config, layers=swapped))


def _window_options(options: dict[str, Any], window: int) -> dict[str, Any]:
    """Return a window's options that are not its defaults, of which rotary's share differs from attention's."""
    attention, default = AttentionConfig(**options), WindowConfig()
    shared = {name: getattr(attention, name) for name in SHARED_OPTIONS}
    return {name: value for name, value in shared.items() if value != getattr(default, name)} | {"window": window}

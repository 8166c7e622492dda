"""Models of the same parameters with other layers."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from flax import nnx

from based_jax.convert.reference import lm_from_reference, reference_weights
from based_jax.convert.skeletons import OWN
from based_jax.errors import UserError
from based_jax.nn.attention_heads import HeadsConfig
from based_jax.nn.lm import LM
from based_jax.nn.lm_config import LMConfig
from based_jax.nn.mixers import mixer_class
from based_jax.nn.mixers.attention import AttentionConfig

SHARED_OPTIONS = {field.name for field in dataclasses.fields(HeadsConfig)} - {"impl"}


def window_from_attention(model: LM, window: int, layers: Collection[int] | None = None, *, sinks: int = 0) -> LM:
    """Return a model in which attention sees a window, its parameters those of the model.

    Args:
      model: with layers of `attention`.
      window: the keys that a query sees, its own included.
      layers: the numbers of the layers that change; None for all of `attention`.
      sinks: the first tokens of a document that a query sees besides.

    Raises:
      UserError: a layer is none of attention, or the window is impossible.
    """
    own = {"window": window} | ({"sinks": sinks} if sinks else {})
    return lm_from_reference(reference_weights(model, OWN), _swapped(model.config, "window", own, layers))


def taylor_window_from_attention(
    model: LM, window: int, feature_dim: int, layers: Collection[int] | None = None, *, sinks: int = 0, seed: int = 0
) -> LM:
    """Return a model with `taylor_window` in place of attention, whose parameters it keeps.

    Maps and gates are new, drawn from the seed; gates begin nearly closed, so that the model is close to its windows.

    Args:
      model: with layers of `attention`.
      window, layers, sinks: as of `window_from_attention`.
      feature_dim: the components K of Taylor attention's queries and keys.
      seed: of the new parameters.

    Raises:
      UserError: a layer is none of attention, or a size is impossible.
    """
    own = {"window": window, "feature_dim": feature_dim} | ({"sinks": sinks} if sinks else {})
    config = _swapped(model.config, "taylor_window", own, layers)
    drawn = reference_weights(LM(config, rngs=nnx.Rngs(seed)), OWN)
    return lm_from_reference(drawn | reference_weights(model, OWN), config)


def _swapped(config: LMConfig, kind: str, own: dict[str, Any], layers: Collection[int] | None) -> LMConfig:
    """Return a config in which those layers are of this kind, with options of its own and attention's."""
    kinds = [kind for kind, _ in config.layers]
    known = [i for i, kind in enumerate(kinds) if kind == "attention"]
    chosen = known if layers is None else sorted(layers)
    for i in chosen:
        if i not in known:
            raise UserError(f"layers has {i}; the layers of attention are {known}.")
    swapped = tuple(
        (kind, _shared_options(options, mixer_class(kind).Config) | own) if i in chosen else (before, options)
        for i, (before, options) in enumerate(config.layers)
    )
    return dataclasses.replace(config, layers=swapped)


def _shared_options(options: dict[str, Any], config: Callable[[], HeadsConfig]) -> dict[str, Any]:
    """Return attention's options that are not the mixer's defaults, of which rotary's share differs."""
    attention, default = AttentionConfig(**options), config()
    shared = {name: getattr(attention, name) for name in sorted(SHARED_OPTIONS)}
    return {name: value for name, value in shared.items() if value != getattr(default, name)}

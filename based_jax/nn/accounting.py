"""Bytes of state as the publications count them, so that our points stand where theirs do.

They count what a mixer remembers of a sequence, in fp32: the recurrent matrix, or the keys and values. What decoding
keeps beside it, a short convolution's last inputs, the token before or the query's own key in a window, is left out,
except in GLA. A mixer's `state_size` counts that too: it is the cache. Where the two differ, its
`published_state_size` stands beside it.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from based_jax.errors import UserError
from based_jax.nn.mixers import Mixer, checked_options, kind_of, make_mixer
from based_jax.nn.own_mixer import OwnMixer, is_own

Layers = Iterable[tuple[Any, Mapping[str, Any]]]

CONVOLUTIONS = ("base_conv", "conv", "rwkv4_channel_mix", "rwkv7_channel_mix")
"""Layers that see a few tokens: not the main mixer of a model that has others."""
COUNTED_ELEMENTS = {"main_mixers": False, "with_convolutions": True}
"""What a row calls the two ways of counting, and their `convolution`."""
ELEMENT_BYTES = 4
"""Of an element of state, which is fp32."""


def state_elements(layers: Layers, d_model: int, seq_len: int, *, convolution: bool) -> int:
    """Return the elements of state of one sequence, over all layers that count.

    Args:
      layers: (mixer name or class, options of its Config) in order, as `LMConfig.layers`.
      d_model: width D.
      seq_len: tokens read.
      convolution: count `CONVOLUTIONS` too, as zoology's re-run of January 2026 does; Figure 2 of arXiv 2402.18668
        counts the main mixers alone. A model that is nothing but convolutions is counted whole either way.

    Raises:
      UserError: no layers, an unknown mixer or option, a width that the heads do not divide, or a number below 1.

    Source: `state_size()` of each mixer in HazyResearch/zoology:zoology/mixers/; for mixers that it lacks, the same.
    """
    for name, value in {"d_model": d_model, "seq_len": seq_len}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it is at least 1.")
    counted = counted_layers(layers, convolution=convolution)
    mixers = (_abstract_mixer(kind, d_model, json.dumps(options, sort_keys=True)) for kind, options in counted)
    return sum(mixer.published_state_size(seq_len) for mixer in mixers)


@functools.cache
def _abstract_mixer(kind: str, d_model: int, options: str) -> Mixer:
    """Return a mixer without values; options as JSON, which can be a key."""
    return nnx.eval_shape(lambda: make_mixer(kind, d_model, rngs=nnx.Rngs(0), **json.loads(options)))


def state_bytes(layers: Layers, d_model: int, seq_len: int, *, convolution: bool) -> int:
    """Return the same in bytes of fp32; for arguments and errors see `state_elements`."""
    return ELEMENT_BYTES * state_elements(layers, d_model, seq_len, convolution=convolution)


def counted_layers(layers: Layers, *, convolution: bool) -> list[tuple[str, dict[str, Any]]]:
    """Return the layers that count; for errors see `state_elements`.

    Of a mixer from outside the package that has but its name left, as in rows, the options are as they are.
    """
    found = [
        (kind, dict(options) if _name_alone(kind) else checked_options(kind, options))
        for kind, options in _named(layers)
    ]
    if not found:
        raise UserError("layers is empty; name at least one mixer.")
    main = [(kind, options) for kind, options in found if kind not in CONVOLUTIONS]
    return found if convolution or not main else main


def _named(layers: Layers) -> Iterable[tuple[str, Mapping[str, Any]]]:
    return ((kind_of(mixer), options) for mixer, options in layers)


def _name_alone(kind: str) -> bool:
    return is_own(kind) and not isinstance(kind, OwnMixer)

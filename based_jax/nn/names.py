"""What models are called: by their main mixers, and by the options that tell them apart."""

from collections.abc import Iterable, Mapping
from typing import Any

from based_jax.nn.accounting import Layers, counted_layers
from based_jax.nn.mixers import kind_of
from based_jax.nn.own_mixer import short

FAMILY_NAMES = {
    "taylor": "Based",
    "window": "Sliding window",
    "taylor_window": "Taylor + window",
    "attention": "Attention",
    "mamba": "Mamba",
    "mamba2": "Mamba-2",
    "deltanet": "DeltaNet",
    "gated_deltanet": "Gated DeltaNet",
    "kda": "KDA",
    "gla": "GLA",
    "rwkv7": "RWKV-7",
    "h3": "H3",
    "hyena": "Hyena",
    "linear": "Linear attention",
    "retnet": "RetNet",
    "lightning": "Lightning",
    "simple_gla": "Simple GLA",
    "hgrn2": "HGRN2",
    "gsa": "GSA",
    "rwkv4": "RWKV-4",
    "rwkv5": "RWKV-5",
    "rwkv6": "RWKV-6",
    "prefix": "Prefix linear attention",
    "base_conv": "Convolution",
    "conv": "Gated convolution",
    "long_conv": "Long convolution",
    "implicit_conv": "Implicit convolution",
    "rwkv4_channel_mix": "RWKV-4 channel mix",
    "rwkv7_channel_mix": "RWKV-7 channel mix",
}
TAYLOR_FEATURE_MAP = "Taylor, 2nd order"
"""The feature map of Based, among those of linear attention."""
OPTION_LETTERS = {
    "feature_dim": "K",
    "window": "w",
    "d_state": "N",
    "num_slots": "slots",
    "expand_ratio": "K",
    "kernel_size": "taps",
    "head_dim": "head",
    "head_size": "head",
    "feature_map": "",
}
"""The options that a label names, and how, unless they are 1 or None; heads come last."""


def family(layers: Layers) -> str:
    """Return the name of a model's main mixers, in their order: "Based", "Sliding window + Based"."""
    return " + ".join(
        dict.fromkeys(FAMILY_NAMES.get(kind, short(kind)) for kind, _ in counted_layers(layers, convolution=False))
    )


def feature_map(layers: Layers) -> tuple[str, int] | None:
    """Return the feature map of a model whose main mixers are one linear attention, and the dimensions K that it takes.

    They are those of queries and keys.
    """
    found = set()
    for kind, options in counted_layers(layers, convolution=False):
        if kind not in ("taylor", "linear"):
            return None
        found.add((options.get("feature_map", TAYLOR_FEATURE_MAP), options["feature_dim"]))
    return found.pop() if len(found) == 1 else None


def label(layers: Layers, d_model: int) -> str:
    """Return a model of its family in a few letters: "D 64, K 16"."""
    parts = [f"D {d_model}"]
    for _, options in counted_layers(layers, convolution=False):
        named = {name: letter for name, letter in OPTION_LETTERS.items() if options.get(name, 1) not in (1, None)}
        parts += [f"{letter} {options[name]}".strip() for name, letter in named.items()]
        if options.get("num_heads", 1) > 1:
            parts.append(f"{options['num_heads']} heads")
    return ", ".join(dict.fromkeys(parts))


def architecture(layers: Layers) -> list[str]:
    """Return one line for each layer: "taylor feature_dim=16 num_heads=1"."""
    return [" ".join([kind_of(kind), *(f"{key}={value}" for key, value in _told(options))]) for kind, options in layers]


def _told(options: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return [(key, value) for key, value in options.items() if key != "impl"]

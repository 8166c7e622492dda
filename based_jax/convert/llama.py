"""config.json of Llama, Mistral, Qwen2 and Qwen3 (transformers:models/*/configuration_*.py), read and written."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from based_jax.convert.fields import Family, Keys, key_names, padding_section, with_defaults
from based_jax.convert.folders import CONFIG_FILE, Fields
from based_jax.errors import UserError, unknown
from based_jax.nn.attention_heads import HeadsConfig
from based_jax.nn.lm import LMConfig
from based_jax.nn.mixers import mixer_class
from based_jax.nn.mixers.attention import AttentionConfig

DEFAULTS: Fields = {"rms_norm_eps": 1e-6}
"""What a config.json without the key means, as in transformers, of what arrays cannot tell."""
ROTARY_BASE: Fields = {"rope_theta": 10000.0}
ROPE_SECTIONS = ("rope_scaling", "rope_parameters")  # as files had them before transformers 5, and since
ROPE_KEYS: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"rotary_factor": "factor"},
    "llama3": {
        "rotary_factor": "factor",
        "rotary_low_freq_factor": "low_freq_factor",
        "rotary_high_freq_factor": "high_freq_factor",
        "rotary_original_len": "original_max_position_embeddings",
    },
}
"""By our scaling: our option -> key."""
ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3"}
"""By `rope_type`: our scaling."""
SLIDING, FULL = "sliding_attention", "full_attention"


class Kind(NamedTuple):
    """What differs between the models of this file.

    Attributes:
      title: what they are, for messages, and the name of their class without its ending.
      qkv_bias, out_bias: whether there are biases; None where config.json says so.
      qk_norm: whether queries and keys are normed.
    """

    title: str
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: bool = False


KINDS = {
    "llama": Kind("Llama"),
    "mistral": Kind("Mistral", qkv_bias=False, out_bias=False),
    "qwen2": Kind("Qwen2", qkv_bias=True, out_bias=False),
    "qwen3": Kind("Qwen3", qk_norm=True),
}


def _values(name: str, fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    fields = with_defaults(fields, DEFAULTS)
    heads = _heads(KINDS[name], fields)
    return {
        "layers": tuple(_layer(heads, window) for window in _windows(name, fields)),
        "d_model": fields["hidden_size"],
        "vocab_size": fields["vocab_size"],
        "pad_vocab_multiple": 1,
        "mlp_dim": fields["intermediate_size"],
        "norm_eps": fields["rms_norm_eps"],
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }


def _layer(heads: dict[str, Any], window: int | None) -> tuple[str, dict[str, Any]]:
    return ("attention", heads) if window is None else ("window", heads | {"window": window})


def _heads(kind: Kind, fields: Fields) -> dict[str, Any]:
    """Return the options of attention and window alike, without those that repeat what follows from others."""
    num_heads, head_dim = fields["num_attention_heads"], fields.get("head_dim")
    stated = fields.get("attention_bias", False)
    bias = stated if kind.qkv_bias is None else kind.qkv_bias
    out_bias = stated if kind.out_bias is None else kind.out_bias
    own_width = head_dim is not None and head_dim * num_heads != fields["hidden_size"]
    return {
        "num_heads": num_heads,
        "num_kv_heads": fields.get("num_key_value_heads"),
        "bias": bias,
        "qk_norm": kind.qk_norm,
        **({"head_dim": head_dim} if own_width else {}),
        **({"out_bias": out_bias} if out_bias != bias else {}),
        **_rotary(fields),
    }


def _rotary(fields: Fields) -> dict[str, Any]:
    """Return rotary's base, share and scaling, of which newer files have a section."""
    section = {name: value for where in ROPE_SECTIONS for name, value in _rope_section(where, fields).items()}
    if "factor" in section and not section.keys() & {"rope_type", "type"}:
        raise UserError(
            f"Rotary has a factor in {CONFIG_FILE}, {section['factor']}, and no rope_type that says of what."
        )
    fields = with_defaults(fields | section, ROTARY_BASE)
    rope_type = str(fields.get("rope_type", fields.get("type", "default")))
    if rope_type not in ROPE_TYPES:
        raise unknown(f"rope_type of {CONFIG_FILE}", rope_type, ROPE_TYPES)
    scaling = ROPE_TYPES[rope_type]
    options = {"rotary_base": fields["rope_theta"], "rotary_fraction": fields.get("partial_rotary_factor", 1.0)}
    if scaling == "none":
        return options
    return options | {"rotary_scaling": scaling} | {our: fields[key] for our, key in ROPE_KEYS[scaling].items()}


def _rope_section(name: str, fields: Fields) -> Fields:
    section = fields.get(name) or {}
    if parts := [key for key, value in section.items() if isinstance(value, dict)]:
        raise UserError(f"{name} has a section '{parts[0]}' in {CONFIG_FILE}; one rotary for all layers is supported.")
    return ROPE_SECTION.checked(section, f"{name}.")


def _windows(name: str, fields: Fields) -> list[int | None]:
    """Return each layer's window, the keys that a query sees with its own; None for all."""
    count, size = fields["num_hidden_layers"], fields.get("sliding_window")
    if name == "llama":
        return [None] * count
    if name == "mistral":
        return [fields["sliding_window"]] * count
    used = fields.get("use_sliding_window", False)
    if fields.get("layer_types") is not None:
        return [_window(kind, size, used) for kind in _layer_types(fields["layer_types"], count)]
    if not used or fields["sliding_window"] is None:
        return [None] * count
    return [None if index < fields["max_window_layers"] else size for index in range(count)]


def _layer_types(types: list, count: int) -> list:
    if len(types) != count:
        raise UserError(f"layer_types has {len(types)} in {CONFIG_FILE}; there are {count} layers.")
    return types


def _window(kind: Any, size: int | None, used: bool) -> int | None:
    if kind not in (FULL, SLIDING):
        raise UserError(f"layer_types has {kind!r:.60} in {CONFIG_FILE}; only '{FULL}' and '{SLIDING}' are supported.")
    if kind == SLIDING and not used:
        raise UserError(f"layer_types has '{SLIDING}' in {CONFIG_FILE}, but use_sliding_window is not true.")
    if kind == SLIDING and size is None:
        raise UserError(f"sliding_window is None in {CONFIG_FILE}; layers of '{SLIDING}' need a number.")
    return size if kind == SLIDING else None


def _config_json(name: str, config: LMConfig) -> Fields:
    """Return the config.json of such a model that comes closest."""
    kind, heads = KINDS[name], _first_heads(config)
    bias = {"attention_bias": heads.bias} if kind.qkv_bias is None else {}
    return {
        "model_type": name,
        "architectures": [f"{kind.title}ForCausalLM"],
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_heads if heads.num_kv_heads is None else heads.num_kv_heads,
        "head_dim": heads.head_dim or config.d_model // heads.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": heads.rotary_base,
        "rope_scaling": _rope_scaling(heads),
        **bias,
        **({} if name == "llama" else _window_fields(name, config)),
        **padding_section(config),
    }


def _first_heads(config: LMConfig) -> HeadsConfig:
    """Return the options of the first layer with heads, or the defaults."""
    found = [mixer_class(kind).Config(**options) for kind, options in config.layers]
    return next((heads for heads in found if isinstance(heads, HeadsConfig)), AttentionConfig())


def _rope_scaling(heads: HeadsConfig) -> Fields | None:
    if heads.rotary_scaling == "none":
        return None
    rope_type = next(theirs for theirs, ours in ROPE_TYPES.items() if ours == heads.rotary_scaling)
    return {"rope_type": rope_type} | {
        key: getattr(heads, option) for option, key in ROPE_KEYS[heads.rotary_scaling].items()
    }


def _window_fields(name: str, config: LMConfig) -> Fields:
    windows = [mixer_class(kind).Config(**options).window for kind, options in config.layers if kind == "window"]
    size = windows[0] if windows else None
    if name == "mistral":
        return {"sliding_window": size}
    types = [SLIDING if kind == "window" else FULL for kind, _ in config.layers]
    return {
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "max_window_layers": next((index for index, kind in enumerate(types) if kind == SLIDING), len(types)),
        "layer_types": types,
    }


ROPE_SECTION = Keys(
    {
        "rope_theta": float,
        "rope_type": str,
        "type": str,
        "partial_rotary_factor": float,
        "factor": float,
        "low_freq_factor": float,
        "high_freq_factor": float,
        "original_max_position_embeddings": int,
    },
)
READ: dict[str, Any] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int | None,
    "head_dim": int | None,
    "partial_rotary_factor": float,
    "rms_norm_eps": float,
    "rope_theta": float,
    "rope_scaling": dict | None,
    "rope_parameters": dict | None,
    "tie_word_embeddings": bool,
}
BIAS = {"attention_bias": bool}
LAYER_TYPES = {
    "use_sliding_window": bool,
    "sliding_window": int | None,
    "max_window_layers": int,
    "layer_types": list | None,
}
NO_MLP_BIAS = {"hidden_act": "silu", "mlp_bias": False, "rope_interleaved": False}
NO_BIAS = NO_MLP_BIAS | {"attention_bias": False}
UNREAD = key_names("pretraining_tp _attn_implementation max_sequence_length max_window_layers")
KEYS = {
    "llama": Keys(READ | BIAS, NO_MLP_BIAS | {"sliding_window": None}, UNREAD),
    "mistral": Keys(READ | {"sliding_window": int | None}, NO_BIAS, UNREAD),
    "qwen2": Keys(READ | LAYER_TYPES, NO_MLP_BIAS | {"use_mrope": False}, UNREAD),
    "qwen3": Keys(READ | LAYER_TYPES | BIAS, NO_MLP_BIAS, UNREAD),
}
FAMILIES = {
    name: Family(
        f"transformers' {kind.title}",
        KEYS[name],
        "num_hidden_layers",
        functools.partial(_values, name),
        "llama",
        functools.partial(_config_json, name),
    )
    for name, kind in KINDS.items()
}

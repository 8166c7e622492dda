"""Folders in the layout of the released checkpoints: model.safetensors and config.json (HazyResearch/based)."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from based_jax.convert.reference import lm_from_reference, reference_weights, unwrapped, window_from_based
from based_jax.errors import UserError
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS

Fields = dict[str, Any]

WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"
FIRST_MLP_KEY = "transformer.layers.0.mlp.fc1.weight"
# the reference rounds F up to 256; some attn-1b weights to 128; our own files are exact
HIDDEN_DIM_MULTIPLES = (256, 128, 1)

# what weights cannot tell: a file that says otherwise describes another function
REQUIRED_FIELDS = {
    "activation_function": "swiglu",
    "rms_norm": True,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_by_inverse_layer_idx": False,
    "rotary_emb_interleaved": False,
}
# what else the reference needs to be told to build the same model
WRITTEN_FIELDS = {
    "residual_in_fp32": True,
    "max_position_embeddings": 0,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
}
MIXER_MODULES = "based.models.mixers"
CONV_L_MAX = 2048  # the reference's convolution must be given one, and uses none
FEATURE_MAP = "TaylorExp"

# option of our mixer -> field
TAYLOR_FIELDS = {"num_heads": "num_heads", "feature_dim": "feature_dim"}
CONV_FIELDS = {"expand": "expand_proj", "kernel_size": "kernel_size"}
ROTARY_FIELDS = {"rotary_fraction": "rotary_emb_fraction", "rotary_base": "rotary_emb_base"}


def load_hf(folder: str | os.PathLike, *, dtype: str = "bfloat16", scan_layers: bool = True) -> LM:
    """Return the Based or attention language model of a folder; parameters become fp32 whatever they are stored in.

    Args:
      folder: with config.json and model.safetensors, in one file or in shards with their index.
      dtype: what the model computes in.
      scan_layers: as in `LMConfig`.

    Raises:
      UserError: a file is missing or unreadable, the config describes another kind of model, or the weights do not
        fit it.
    """
    folder = Path(folder)
    fields, weights = _read_json(folder / CONFIG_FILE), unwrapped(_read_weights(folder))
    try:
        _check_required(fields)
        config = _lm_config(fields, _hidden_dim(fields, weights), dtype=dtype, scan_layers=scan_layers)
    except KeyError as error:
        raise UserError(f"'{folder / CONFIG_FILE}' lacks {error} of a Based or attention language model.") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"'{folder / CONFIG_FILE}' has a value of the wrong type: {error}.") from None
    return lm_from_reference(weights, config)


def save_hf(model: LM, folder: str | os.PathLike) -> None:
    """Write a Based or attention language model as fp32 safetensors and config.json.

    HazyResearch/based reads what this writes where the MLP's width is a multiple of 256; it rounds others up.

    Raises:
      UserError: the layout has no place for a part of the model, or the folder is not empty or cannot be written.
    """
    folder = Path(folder)
    fields = _config_json(model.config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' is not empty; name a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(reference_weights(model), folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{folder}' cannot be written: {error}.") from None


def _read_json(path: Path) -> Fields:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {error}.") from None
    if not isinstance(fields, dict):
        raise UserError(f"'{path}' holds a {type(fields).__name__}; it is a JSON object.")
    return fields


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    weights: dict[str, np.ndarray] = {}
    for name in _shards(folder):
        try:
            weights |= load_file(folder / name)
        except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy does not have
            raise UserError(f"'{folder / name}' cannot be read: {error}.") from None
    return weights


def _shards(folder: Path) -> list[str]:
    if not (folder / INDEX_FILE).exists():
        return [WEIGHTS_FILE]
    files = _read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"'{folder / INDEX_FILE}' has no weight_map, which names the file of each array.")
    return sorted(set(files.values()))


def _check_required(fields: Fields) -> None:
    for name, value in REQUIRED_FIELDS.items():
        if fields.get(name, value) != value:
            raise UserError(f"{name} is {fields[name]!r} in {CONFIG_FILE}; only {value!r} is supported.")
    linear = fields.get("alt_mixer") or {}
    feature_map = linear.get("feature_map", {})
    if not feature_map.get("_target_", FEATURE_MAP).endswith(FEATURE_MAP):
        raise UserError(
            f"The feature map is {feature_map['_target_']!r} in {CONFIG_FILE}; only {FEATURE_MAP} is supported."
        )
    if feature_map.get("input_dim", linear.get("feature_dim")) != linear.get("feature_dim"):
        raise UserError(f"input_dim is {feature_map['input_dim']} in {CONFIG_FILE}; it is feature_dim.")


def _hidden_dim(fields: Fields, weights: Mapping[str, np.ndarray]) -> int:
    """Return F: n_inner, or 8D/3 where it is null, rounded up as the weights of the first layer say."""
    d_model = fields["n_embd"]
    inner = fields.get("n_inner") or int(8 * d_model / 3)
    rounded = [-(-inner // multiple) * multiple for multiple in HIDDEN_DIM_MULTIPLES]
    stored = weights[FIRST_MLP_KEY].shape if FIRST_MLP_KEY in weights else ()
    return next((F for F in rounded if stored == (2 * F, d_model)), rounded[0])


def _lm_config(fields: Fields, hidden_dim: int, dtype: str, scan_layers: bool) -> LMConfig:
    return LMConfig(
        layers=tuple(_layer(fields, index) for index in range(fields["n_layer"])),
        d_model=fields["n_embd"],
        vocab_size=fields["vocab_size"],
        mlp_dim=hidden_dim,
        dtype=dtype,
        scan_layers=scan_layers,
        **_options_of(fields, {"pad_vocab_multiple": "pad_vocab_size_multiple"}),
    )


def _layer(fields: Fields, index: int) -> tuple[str, dict[str, Any]]:
    """Return the mixer of a layer: Taylor attention and windows are listed, the rest are convolutions or attention."""
    rotary = {option: float(value) for option, value in _options_of(fields, ROTARY_FIELDS).items()}
    if fields.get("alt_mixer") is None:
        return "attention", {"num_heads": fields["n_head"], **rotary}
    if index in fields["alt_mixer_layers"]:
        return "taylor", _options_of(fields["alt_mixer"], TAYLOR_FIELDS)
    if index in fields["alt_mixer_2_layers"]:
        own = fields["alt_mixer_2"]
        return "window", {"num_heads": own["num_heads"], "window": window_from_based(own["window_size"]), **rotary}
    return "conv", _options_of(fields.get("mixer", {}), CONV_FIELDS)


def _options_of(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the options whose fields are there; the others keep our defaults, which are the released values."""
    return {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}


def _config_json(config: LMConfig) -> Fields:
    """Return config.json of a model, checked by reading it back."""
    fields = {
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "n_embd": config.d_model,
        "n_layer": len(config.layers),
        "n_inner": config.hidden_dim,
        **REQUIRED_FIELDS,
        **WRITTEN_FIELDS,
        **_mixer_fields(config),
    }
    if (config.norm, config.last_norm, config.mlp) != ("rms", "rms", "swiglu") or not _reads_back(fields, config):
        raise UserError(
            "The released layout holds models of 'conv', 'taylor' and 'window', or of 'attention' alone, with RMSNorm,"
            f" SwiGLU, no biases, and the same options in all layers of a kind; this one is {config}."
        )
    return fields


def _mixer_fields(config: LMConfig) -> Fields:
    kinds = [kind for kind, _ in config.layers]
    found = dict(config.layers)
    attention, conv, linear, window = (
        MIXERS[kind].Config(**found.get(kind, {})) for kind in ("attention", "conv", "taylor", "window")
    )
    if "attention" in kinds:
        return {"n_head": attention.num_heads, **_fields_of(attention, ROTARY_FIELDS)}
    feature_map = {"_target_": f"{MIXER_MODULES}.linear_attention.{FEATURE_MAP}", "input_dim": linear.feature_dim}
    return {
        "n_head": (window if "window" in kinds else linear).num_heads,  # the reference takes a window's heads from here
        **_fields_of(window, ROTARY_FIELDS),
        "alt_mixer_layers": [index for index, kind in enumerate(kinds) if kind == "taylor"],
        "alt_mixer_2_layers": [index for index, kind in enumerate(kinds) if kind == "window"],
        "mixer": {
            "_target_": f"{MIXER_MODULES}.convolution.BaseConv",
            "l_max": CONV_L_MAX,
            "use_bias": True,
            **_fields_of(conv, CONV_FIELDS),
        },
        "alt_mixer": {
            "_target_": f"{MIXER_MODULES}.linear_attention.LinearAttention",
            "feature_map": feature_map,
            **_fields_of(linear, TAYLOR_FIELDS),
        },
        "alt_mixer_2": {
            "_target_": f"{MIXER_MODULES}.slide_attention.SlidingAttention",
            "num_heads": window.num_heads,
            "window_size": 2 * (window.window - 1),
            "causal": True,
        },
    }


def _fields_of(options: Any, names: Mapping[str, str]) -> Fields:
    return {theirs: getattr(options, ours) for ours, theirs in names.items()}


def _reads_back(fields: Fields, config: LMConfig) -> bool:
    """Return whether config.json gives the same layers, defaults filled in and implementations left aside."""

    def resolved(layers):
        return [(kind, dataclasses.replace(MIXERS[kind].Config(**options), impl="auto")) for kind, options in layers]

    read = _lm_config(fields, config.hidden_dim, config.dtype, config.scan_layers)
    return resolved(read.layers) == resolved(config.layers)

"""Folders in the layout of the released checkpoints: model.safetensors and config.json (HazyResearch/based)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from based_jax.convert.reference import DEAD, lm_from_reference, reference_weights
from based_jax.errors import UserError
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FC1 = "transformer.layers.0.mlp.fc1.weight"


def load_hf(folder: str | os.PathLike, *, dtype: str = "bfloat16", scan_layers: bool = True) -> LM:
    """Return the Based or attention language model of a folder; parameters become fp32 whatever they are stored in.

    Args:
      folder: with config.json and model.safetensors, in one file or with its index.
      dtype: what the model computes in.
      scan_layers: as in `LMConfig`.

    Raises:
      UserError: a file is missing or unreadable, or the weights do not fit the config.
    """
    folder = Path(folder)
    fields = _read_json(folder / CONFIG)
    weights = {key.removeprefix("model."): value for key, value in _read_weights(folder).items()}
    try:
        config = _lm_config(fields, hidden=weights[FC1].shape[0] // 2, dtype=dtype, scan_layers=scan_layers)
    except KeyError as error:
        raise UserError(f"'{folder}' holds no Based or attention language model: {error} is missing.") from None
    return lm_from_reference(weights, config)


def save_hf(model: LM, folder: str | os.PathLike) -> None:
    """Write a Based or attention language model as fp32 safetensors and config.json.

    Raises:
      UserError: the layout has no place for a part of the model, or the folder is not empty.
    """
    folder = Path(folder)
    fields = _hf_fields(model.config)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"Folder '{folder}' is not empty; name a new one.")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(reference_weights(model), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {error}.") from None


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    index = folder / INDEX
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else [WEIGHTS]
    weights: dict[str, np.ndarray] = {}
    for name in files:
        try:
            weights |= load_file(folder / name)
        except Exception as error:
            raise UserError(f"'{folder / name}' cannot be read: {error}.") from None
    return {key: value for key, value in weights.items() if key not in DEAD}


def _lm_config(fields: dict[str, Any], hidden: int, dtype: str, scan_layers: bool) -> LMConfig:
    return LMConfig(
        layers=tuple(_layer(fields, index) for index in range(fields["n_layer"])),
        d_model=fields["n_embd"],
        vocab_size=fields["vocab_size"],
        pad_vocab_multiple=fields["pad_vocab_size_multiple"],
        mlp_dim=hidden,
        dtype=dtype,
        scan_layers=scan_layers,
    )


def _layer(fields: dict[str, Any], index: int) -> tuple[str, dict[str, Any]]:
    """Return the mixer of a layer: Taylor attention and windows are listed, the rest are convolutions or attention."""
    if fields.get("mixer") is None:
        return "attention", {"num_heads": fields["n_head"], "rotary_fraction": float(fields["rotary_emb_fraction"])}
    if index in fields["alt_mixer_layers"]:
        linear = fields["alt_mixer"]
        return "taylor", {"num_heads": linear["num_heads"], "feature_dim": linear["feature_dim"]}
    if index in fields["alt_mixer_2_layers"]:
        window = fields["alt_mixer_2"]
        return "window", {"num_heads": window["num_heads"], "window": window["window_size"] // 2 + 1}
    return "conv", {"expand": fields["mixer"]["expand_proj"], "kernel_size": fields["mixer"].get("kernel_size", 3)}


def _hf_fields(config: LMConfig) -> dict[str, Any]:
    """Return config.json of a model, checked by reading it back."""
    kinds = [kind for kind, _ in config.layers]
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "n_embd": config.d_model,
        "n_layer": len(kinds),
        "n_inner": config.hidden_dim,
        "rms_norm": True,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "swiglu",
        "residual_in_fp32": True,
        "max_position_embeddings": 0,
        "tie_word_embeddings": True,
    }
    options = {kind: dict(values) for kind, values in reversed(config.layers)}
    if set(kinds) == {"attention"}:
        own = options["attention"]
        fields |= {"n_head": own.get("num_heads", 16), "rotary_emb_fraction": own.get("rotary_fraction", 0.5)}
    else:
        fields |= _based_fields(kinds, options)
    if config.norm != "rms" or config.mlp != "swiglu" or not _expresses(fields, config):
        raise UserError(
            "The released layout holds models of 'conv', 'taylor' and 'window' (an odd number of keys), or of"
            " 'attention' alone, with RMSNorm, SwiGLU and the same options in all layers of a kind;"
            f" this one is {config}."
        )
    return fields


def _based_fields(kinds: list[str], options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    conv, linear, window = (options.get(kind, {}) for kind in ("conv", "taylor", "window"))
    heads = linear.get("num_heads", window.get("num_heads", 16))
    return {
        "n_head": heads,
        "alt_mixer_layers": [index for index, kind in enumerate(kinds) if kind == "taylor"],
        "alt_mixer_2_layers": [index for index, kind in enumerate(kinds) if kind == "window"],
        "mixer": {"expand_proj": conv.get("expand", 4), "kernel_size": conv.get("kernel_size", 3), "use_bias": True},
        "alt_mixer": {
            "num_heads": heads,
            "feature_dim": linear.get("feature_dim", 16),
            "feature_map": {"input_dim": linear.get("feature_dim", 16)},
        },
        "alt_mixer_2": {
            "num_heads": window.get("num_heads", 16),
            "window_size": 2 * (window.get("window", 64) - 1),
        },
    }


def _expresses(fields: dict[str, Any], config: LMConfig) -> bool:
    """Return whether config.json gives the same mixers back, defaults filled in."""
    read = _lm_config(fields, config.hidden_dim, config.dtype, config.scan_layers)
    return all(
        here == there and MIXERS[here].Config(**mine) == MIXERS[there].Config(**read_back)
        for (here, mine), (there, read_back) in zip(config.layers, read.layers, strict=True)
    )

"""Folders of published models, config.json and arrays: those of several families are read, Based's are written too."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from based_jax import config as configs
from based_jax.convert import based
from based_jax.convert.fields import Family
from based_jax.convert.folders import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Fields,
    read_json,
    read_weights,
)
from based_jax.convert.reference import check_layers, lm_from_reference, parameters, reference_weights, unwrapped
from based_jax.convert.transformers import LLAMA, MAMBA, MAMBA_SSM, RWKV
from based_jax.errors import UserError, unknown
from based_jax.folders import check_free, local_path, written_whole
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS

FAMILIES = {"gpt2": based.FAMILY, "based": based.FAMILY, "llama": LLAMA, "mamba": MAMBA, "rwkv": RWKV}
"""By `model_type`; a file without one, or with GPT-2's, and with `ssm_cfg`, is a Mamba of its authors."""
TOKENIZER_KEY = "tokenizer"
TRAINING_FIELDS = ("init_std", "init_recipe", "embed_dropout", "remat")
"""What a config says of training alone, which stands in a section of our own beside the tokenizer's name."""
LAYOUT = (
    "The released layout holds models of 'conv', 'taylor' and 'window', or of 'attention' alone, with RMSNorm, SwiGLU,"
    " no biases, and the same options in all layers of a kind"
)


def load_hf(folder: str | os.PathLike, *, dtype: str = "bfloat16", scan_layers: bool = True) -> LM:
    """Return the language model of a folder; parameters become fp32 whatever they are stored in.

    Based and attention models in the released layout, Llama, Mamba and RWKV-4, told apart by `model_type`. A torch
    file is read without torch, and nothing that its pickle asks for is run.

    Args:
      folder: with config.json and model.safetensors or pytorch_model.bin, in one file or in shards with their index.
      dtype: what the model computes in.
      scan_layers: as in `LMConfig`.

    Raises:
      UserError: a file is missing or unreadable, the config describes another kind of model, or the weights do not
        fit it.
    """
    path = local_path(folder, "folder") / CONFIG_FILE
    fields = read_json(path)
    family = family_of(fields)
    weights = unwrapped(read_weights(path.parent))
    try:
        known = family.keys.checked(fields)
        check_layers(weights, family.num_layers, known.get(family.num_layers, 1))
        config = _lm_config(family, known, weights, dtype, scan_layers)
    except KeyError as error:
        raise UserError(f"'{path}' lacks {error} of {family.title}.") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"'{path}' has a value of the wrong type: {error}.") from None
    return lm_from_reference(weights, config)


def save_hf(model: LM, folder: str | os.PathLike, *, tokenizer: str | None = None) -> None:
    """Write a Based or attention language model as fp32 safetensors and config.json, whole or not at all.

    First it is read back as `load_hf` does and compared with the model: the whole config, and every array.
    HazyResearch/based reads what this writes where the MLP's width is a multiple of 256; it rounds others up.

    Args:
      model: the model.
      folder: new, or empty.
      tokenizer: the name of its tokenizer, for `generate --hf`.

    Raises:
      UserError: the layout has no place for a part of the model, or the folder is not empty or cannot be written.
    """
    target = local_path(folder, "folder")
    own = {name: getattr(model.config, name) for name in TRAINING_FIELDS}
    fields = based.config_json(model.config) | {
        based.OWN_SECTION: own if tokenizer is None else own | {TOKENIZER_KEY: tokenizer}
    }
    text = json.dumps(fields, indent=2, default=np.generic.item) + "\n"
    config = _read_back_config(json.loads(text), model.config)
    check_free(target)
    weights = reference_weights(model)
    _check_same_arrays(model, lm_from_reference(weights, config))
    with written_whole(target) as part:
        part.mkdir()
        save_file(weights, part / WEIGHTS_FILE)
        (part / CONFIG_FILE).write_text(text, encoding="utf-8")


def family_of(fields: Fields) -> Family:
    """Return the family of a config.json.

    Raises:
      UserError: its models are not known here.
    """
    kind = fields.get("model_type", "gpt2")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown(f"model_type of {CONFIG_FILE}", str(kind), FAMILIES)
    return MAMBA_SSM if FAMILIES[kind] is based.FAMILY and "ssm_cfg" in fields else FAMILIES[kind]


def _lm_config(
    family: Family, fields: Fields, weights: Mapping[str, np.ndarray], dtype: str, scan_layers: bool
) -> LMConfig:
    own = fields.get(based.OWN_SECTION, {})
    training = {name: own[name] for name in TRAINING_FIELDS if name in own}
    values = family.values(fields, weights) | training | {"dtype": dtype, "scan_layers": scan_layers}
    return configs.build(LMConfig, values)


def _read_back_config(fields: Fields, config: LMConfig) -> LMConfig:
    """Return what config.json is read as, after a check that it is the model's config."""
    width = np.broadcast_to(np.float32(0), (2 * config.hidden_dim, config.d_model))  # the MLP's, of no memory
    try:
        known = based.FAMILY.keys.checked(fields)
        read = _lm_config(based.FAMILY, known, {based.FIRST_MLP_KEY: width}, config.dtype, config.scan_layers)
    except (UserError, TypeError) as error:
        raise UserError(f"{LAYOUT}; this one cannot be read back: {str(error).rstrip('.')}.") from None
    ours, theirs = _resolved(config), _resolved(read)
    for name, value in ours.items():
        if value != theirs.get(name):
            raise UserError(f"{LAYOUT}; here {name} is {value!r}, which would be read as {theirs.get(name)!r}.")
    return read


def _resolved(config: LMConfig) -> dict[str, Any]:
    """Return every value of a config by name, defaults filled in, but for implementations."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values |= {"mlp_dim": config.hidden_dim, "final_norm": config.last_norm}
    for index, (kind, options) in enumerate(values.pop("layers")):
        values[f"layers[{index}]"] = kind
        for name, value in vars(MIXERS[kind].Config(**options)).items():
            values[f"layers[{index}].{name}"] = None if name == "impl" else value
    return values


def _check_same_arrays(model: LM, read: LM) -> None:
    ours, theirs = ({path: np.asarray(leaf[...]) for path, leaf in parameters(x).items()} for x in (model, read))
    for path in sorted(ours.keys() | theirs.keys()):
        if path not in ours or path not in theirs or not np.array_equal(ours[path], theirs[path], equal_nan=True):
            raise UserError(f"{LAYOUT}; the values of '{path}' would be read as others.")

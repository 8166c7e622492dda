"""Folders of published models, config.json and arrays, read and written."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from based_jax import config as configs
from based_jax.convert.based import FIRST_MLP_KEY
from based_jax.convert.families import LAYOUTS, family_of
from based_jax.convert.fields import OWN_SECTION, PADDING_FIELDS, Family
from based_jax.convert.folders import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Fields,
    read_json,
    read_weights,
)
from based_jax.convert.reference import check_layers, lm_from_reference, parameters, reference_weights, unwrapped
from based_jax.convert.tokenizers import tokenizer_fields, write_tokenizer
from based_jax.errors import UserError, unknown
from based_jax.folders import check_free, local_path, written_whole
from based_jax.nn.attention_heads import HeadsConfig
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import mixer_class

TRAINING_FIELDS = ("init_std", "init_recipe", "embed_dropout", "remat")
"""What a config says of training alone, which stands in a section of our own beside the tokenizer's name."""


def load_hf(folder: str | os.PathLike, *, dtype: str = "bfloat16", scan_layers: bool = True) -> LM:
    """Return the language model of a folder; parameters become fp32 whatever they are stored in.

    What `save_hf` writes, the released Based, attention and Mamba models, Llama, Mistral, Qwen2, Qwen3, Mamba and
    RWKV-4, told apart by `model_type`. A torch file is read without torch, and nothing that its pickle asks for is run.

    Args:
      folder: with config.json and model.safetensors or pytorch_model.bin, in one file or in shards with their index.
      dtype: what the model computes in.
      scan_layers: as in `LMConfig`.

    Raises:
      UserError: a file is missing or unreadable, the config describes another kind of model, or the weights do not
        fit it.
    """
    return lm_from_reference(*_read(folder, dtype, scan_layers))


def hf_config(folder: str | os.PathLike, *, dtype: str = "bfloat16", scan_layers: bool = True) -> LMConfig:
    """Return the config of the language model that `load_hf` returns; arguments and errors are the same."""
    return _read(folder, dtype, scan_layers)[1]


def _read(folder: str | os.PathLike, dtype: str, scan_layers: bool) -> tuple[dict[str, np.ndarray], LMConfig]:
    path = local_path(folder, "folder") / CONFIG_FILE
    fields = read_json(path)
    family = family_of(fields)
    weights = unwrapped(read_weights(path.parent))
    try:
        known = family.keys.checked(fields)
        check_layers(weights, family.num_layers, known.get(family.num_layers, 1))
        config = _lm_config(family, known, _own_section(fields), weights, dtype=dtype, scan_layers=scan_layers)
    except KeyError as error:
        raise UserError(f"'{path}' lacks {error} of {family.title}.") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"'{path}' has a value of the wrong type: {error}.") from None
    return weights, config


def save_hf(model: LM, folder: str | os.PathLike, *, layout: str | None = None, tokenizer: str | None = None) -> str:
    """Write a language model as fp32 safetensors and config.json, whole or not at all; return the layout's name.

    First it is read back as `load_hf` does and compared with the model: the whole config, and every array.
    HazyResearch/based reads what this writes where the MLP's width is a multiple of 256; it rounds others up.

    Args:
      model: the model.
      folder: new, or empty.
      layout: an entry of `LAYOUTS`; None for the first that has a place for the whole model.
      tokenizer: the name of its tokenizer, or the path of its tokenizer.json; the folder gets one, but for "bytes".

    Raises:
      UserError: the layout has no place for a part of the model, or the folder is not empty or cannot be written.
    """
    target = local_path(folder, "folder")
    name, text, config = _fitting(model.config, layout, tokenizer_fields(tokenizer))
    check_free(target)
    weights = reference_weights(model, LAYOUTS[name].skeleton)
    _check_same_arrays(name, model, lm_from_reference(weights, config))
    with written_whole(target) as part:
        part.mkdir()
        save_file(weights, part / WEIGHTS_FILE)
        (part / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_tokenizer(tokenizer, part)
    return name


def _fitting(config: LMConfig, layout: str | None, told: Fields) -> tuple[str, str, LMConfig]:
    """Return the layout of that name, or the first that a model fits, its config.json, and what that is read as.

    `told` are fields that say nothing of the model.
    """
    if layout is not None and layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    names = LAYOUTS if layout is None else [layout]
    for name in names:
        text = _config_text(LAYOUTS[name], config, told)
        try:
            return name, text, _read_back(name, json.loads(text), config)
        except UserError:
            if name == [*names][-1]:
                raise
    raise AssertionError("there are layouts")


def _config_text(family: Family, config: LMConfig, told: Fields) -> str:
    assert family.fields is not None
    fields, training = family.fields(config), {name: getattr(config, name) for name in TRAINING_FIELDS}
    own = fields.get(OWN_SECTION, {}) | training | told.get(OWN_SECTION, {})
    return json.dumps(fields | told | {OWN_SECTION: own}, indent=2, default=np.generic.item) + "\n"


def _own_section(fields: Fields) -> Fields:
    own = fields.get(OWN_SECTION, {})
    if not isinstance(own, dict):
        raise TypeError(f"{OWN_SECTION} is {own!r:.60}, which is no dict of a model")
    return own


def _lm_config(
    family: Family, known: Fields, own: Fields, weights: Mapping[str, np.ndarray], **computation: Any
) -> LMConfig:
    values = family.values(known, weights)
    values |= {name: own[name] for name in (*TRAINING_FIELDS, *PADDING_FIELDS) if name in own}
    return configs.build(LMConfig, values | computation)


def _read_back(name: str, fields: Fields, config: LMConfig) -> LMConfig:
    """Return what config.json is read as, after a check that it is the model's config."""
    width = np.broadcast_to(np.float32(0), (2 * config.hidden_dim, config.d_model))  # the MLP's, of no memory
    family, computation = LAYOUTS[name], {"dtype": config.dtype, "scan_layers": config.scan_layers}
    try:
        known, weights = family.keys.checked(fields), {FIRST_MLP_KEY: width}
        read = _lm_config(family, known, _own_section(fields), weights, **computation)
    except (UserError, TypeError) as error:
        raise UserError(
            f"The layout of {family.title} has no place for this model: {str(error).rstrip('.')}."
        ) from None
    ours, theirs = resolved(config), resolved(read)
    for key, value in ours.items():
        if value != theirs.get(key):
            raise UserError(
                f"The layout of {family.title} has no place for {key} {value!r}, which would be read as"
                f" {theirs.get(key)!r}."
            )
    return read


def resolved(config: LMConfig) -> dict[str, Any]:
    """Return every value of a config by name, defaults filled in, but for implementations."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values |= {"mlp_dim": config.hidden_dim, "final_norm": config.last_norm}
    if config.mlp == "none":
        del values["mlp_dim"]
    for index, (kind, options) in enumerate(values.pop("layers")):
        values[f"layers[{index}]"] = kind
        for name, value in _resolved_options(mixer_class(kind).Config(**options), config.d_model).items():
            values[f"layers[{index}].{name}"] = value
    return values


def _resolved_options(options: Any, d_model: int) -> dict[str, Any]:
    """Return a mixer's options, with what None stands for in those of attention."""
    values = vars(options) | {"impl": None}
    if isinstance(options, HeadsConfig):
        heads = options.num_heads
        values["num_kv_heads"] = heads if options.num_kv_heads is None else options.num_kv_heads
        values["head_dim"] = d_model // heads if options.head_dim is None else options.head_dim
        values["out_bias"] = options.bias if options.out_bias is None else options.out_bias
    return values


def _check_same_arrays(name: str, model: LM, read: LM) -> None:
    ours, theirs = ({path: np.asarray(leaf[...]) for path, leaf in parameters(x).items()} for x in (model, read))
    for path in sorted(ours.keys() | theirs.keys()):
        if path not in ours or path not in theirs or not np.array_equal(ours[path], theirs[path], equal_nan=True):
            raise UserError(f"In the layout of {LAYOUTS[name].title} the values of '{path}' would be read as others.")

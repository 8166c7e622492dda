"""config.json of any model: what has no place in a published layout keeps our config and our names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from based_jax import config as configs
from based_jax.convert.fields import Family, Keys
from based_jax.convert.folders import CONFIG_FILE, Fields
from based_jax.errors import UserError
from based_jax.nn.lm import LMConfig

MODEL_TYPE = "based_jax"


def _values(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    model = fields["model"]
    layers, told = model.get("layers"), fields.get("num_layers")
    if isinstance(layers, list) and told not in (None, len(layers)):
        raise UserError(f"num_layers is {told} in {CONFIG_FILE}, but model.layers has {len(layers)}; they are as many.")
    return model


def _config_json(config: LMConfig) -> Fields:
    return {"model_type": MODEL_TYPE, "num_layers": len(config.layers), "model": configs.to_dict(config)}


OWN = Family("this package", Keys({"num_layers": int, "model": dict}), "num_layers", _values, "based_jax", _config_json)

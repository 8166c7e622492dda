"""config.json of any model: what has no place in a published layout keeps our config and our names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from based_jax import config as configs
from based_jax.convert.fields import Family, Keys
from based_jax.convert.folders import Fields
from based_jax.nn.lm import LMConfig

MODEL_TYPE = "based_jax"


def _values(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return fields["model"]


def _config_json(config: LMConfig) -> Fields:
    return {"model_type": MODEL_TYPE, "num_layers": len(config.layers), "model": configs.to_dict(config)}


OWN = Family("this package", Keys({"num_layers": int, "model": dict}), "num_layers", _values, "based_jax", _config_json)

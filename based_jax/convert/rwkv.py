"""config.json of RWKV-4 as transformers writes it (transformers:models/rwkv/configuration_rwkv.py), read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from based_jax.convert.fields import Family, Keys, key_names, with_defaults
from based_jax.convert.folders import Fields

DEFAULTS: Fields = {"layer_norm_epsilon": 1e-5}


def _values(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    fields = with_defaults(fields, DEFAULTS)
    width = fields["hidden_size"]
    inner = fields.get("intermediate_size") or 4 * width
    attention = fields.get("attention_hidden_size") or width
    time_mix = {} if attention == width else {"attention_dim": attention}
    return {
        "layers": (("rwkv4", time_mix), ("rwkv4_channel_mix", {"expand": inner / width})) * fields["num_hidden_layers"],
        "d_model": width,
        "vocab_size": fields["vocab_size"],
        "pad_vocab_multiple": 1,
        "mlp": "none",
        "norm": "layer",
        "embed_norm": True,
        "norm_eps": fields["layer_norm_epsilon"],
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }


RWKV = Family(
    "transformers' RWKV-4",
    Keys(
        read={
            "vocab_size": int,
            "hidden_size": int,
            "num_hidden_layers": int,
            "tie_word_embeddings": bool,
            "attention_hidden_size": int | None,
            "intermediate_size": int | None,
            "layer_norm_epsilon": float,
        },
        harmless=key_names("context_length"),
    ),
    "num_hidden_layers",
    _values,
)

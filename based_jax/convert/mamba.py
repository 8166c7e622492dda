"""config.json of Mamba: its authors' (state-spaces/mamba:mamba_ssm/models/config_mamba.py), and transformers'."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from based_jax.convert.fields import Family, Keys, fields_of, key_names, options_of, padding_section
from based_jax.convert.folders import CONFIG_FILE, Fields
from based_jax.errors import UserError
from based_jax.nn.lm import LMConfig
from based_jax.nn.mixers.mamba import MambaConfig

# option of our config or mixer -> key
SSM_KEYS = {
    "d_state": "d_state",
    "d_conv": "d_conv",
    "expand": "expand",
    "bias": "bias",
    "conv_bias": "conv_bias",
}
HF_KEYS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}
HF_MODEL_KEYS = {"norm_eps": "layer_norm_epsilon", "tie_embeddings": "tie_word_embeddings"}
STEPS_HARMLESS = frozenset(f"time_step_{name}" for name in ("scale", "min", "max", "init_scheme", "floor"))


def _rank(value: int | str) -> int | str:
    """Return our rank of dt: 0 for "auto", which is D/16."""
    return 0 if value == "auto" else value


def _config_of(options: dict[str, Any], num_layers: int, **values: Any) -> dict[str, Any]:
    return {"layers": (("mamba", options),) * num_layers, "mlp": "none", **values}


def _ssm_values(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    own = SSM_SECTION.checked(fields["ssm_cfg"] or {}, "ssm_cfg.")
    options = options_of(own, SSM_KEYS) | {"dt_rank": _rank(own.get("dt_rank", "auto"))}
    return _config_of(
        options,
        fields["n_layer"],
        d_model=fields["d_model"],
        vocab_size=fields["vocab_size"],
        pad_vocab_multiple=fields.get("pad_vocab_size_multiple", 8),
        **options_of(fields, {"tie_embeddings": "tie_embeddings"}),
    )


def _ssm_fields(config: LMConfig) -> Fields:
    mamba = _first_mamba(config)
    return {
        "d_model": config.d_model,
        "n_layer": len(config.layers),
        "d_intermediate": 0,
        "vocab_size": config.vocab_size,
        "ssm_cfg": fields_of(mamba, SSM_KEYS) | {"dt_rank": mamba.dt_rank or "auto"},
        "rms_norm": True,
        "residual_in_fp32": True,
        "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def _hf_values(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    width = fields["hidden_size"]
    options = options_of(fields, HF_KEYS) | {"dt_rank": _rank(fields.get("time_step_rank", "auto"))}
    inner = options.get("expand", MambaConfig.expand) * width
    if fields.get("intermediate_size", inner) != inner:
        raise UserError(
            f"intermediate_size is {fields['intermediate_size']} in {CONFIG_FILE}; it is expand D, {inner}."
        )
    values = {"d_model": width, "vocab_size": fields["vocab_size"], "pad_vocab_multiple": 1}
    return _config_of(options, fields["num_hidden_layers"], **values, **options_of(fields, HF_MODEL_KEYS))


def _hf_fields(config: LMConfig) -> Fields:
    mamba = _first_mamba(config)
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.layers),
        "vocab_size": config.padded_vocab_size,
        "intermediate_size": mamba.expand * config.d_model,
        "time_step_rank": mamba.dt_rank or "auto",
        "hidden_act": "silu",
        "residual_in_fp32": True,
        **fields_of(mamba, HF_KEYS),
        **fields_of(config, HF_MODEL_KEYS),
        **padding_section(config),
    }


def _first_mamba(config: LMConfig) -> MambaConfig:
    return MambaConfig(**dict(config.layers).get("mamba", {}))


SSM_SECTION = Keys(
    {"d_state": int, "d_conv": int, "expand": int, "dt_rank": int | str, "bias": bool, "conv_bias": bool},
    {"layer": "Mamba1"},
    key_names("dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path"),
)
MAMBA_SSM = Family(
    "state-spaces/mamba",
    Keys(
        read={
            "d_model": int,
            "n_layer": int,
            "vocab_size": int,
            "ssm_cfg": dict | None,
            "pad_vocab_size_multiple": int,
            "tie_embeddings": bool,
        },
        fixed={"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": [], "scale_attn_by_inverse_layer_idx": False},
        harmless=key_names(
            "attn_cfg fused_add_norm fused_bias_fc fused_dropout_add_ln fused_mlp n_embd n_head use_fast_path"
        ),
    ),
    "n_layer",
    _ssm_values,
    "mamba",
    _ssm_fields,
)
MAMBA = Family(
    "transformers' Mamba",
    Keys(
        read={
            "vocab_size": int,
            "hidden_size": int,
            "num_hidden_layers": int,
            "tie_word_embeddings": bool,
            "state_size": int,
            "conv_kernel": int,
            "expand": int,
            "use_bias": bool,
            "use_conv_bias": bool,
            "time_step_rank": int | str,
            "intermediate_size": int,
            "layer_norm_epsilon": float,
        },
        fixed={"hidden_act": "silu"},
        harmless=STEPS_HARMLESS | {"use_mambapy", "use_associative_scan"},
    ),
    "num_hidden_layers",
    _hf_values,
    "mamba_hf",
    _hf_fields,
)

"""config.json of Llama, Mamba and RWKV-4 as Hugging Face's transformers writes them, and of Mamba as its authors do."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from based_jax.convert.fields import Family, Keys, key_names, options_of
from based_jax.convert.folders import CONFIG_FILE, Fields
from based_jax.errors import UserError

# what a config.json without the key means, where it is not what `LMConfig` means
LLAMA_DEFAULTS: Fields = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
RWKV_DEFAULTS: Fields = {"tie_word_embeddings": False}

# option of our mixer -> key
MAMBA_KEYS = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand"}
SSM_KEYS = {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand"}
STEPS_HARMLESS = frozenset(f"time_step_{name}" for name in ("scale", "min", "max", "init_scheme", "floor"))


def _one_of(name: str, value: Any, wanted: Any, what: str) -> None:
    if value != wanted:
        raise UserError(f"{name} is {value!r:.60} in {CONFIG_FILE}; it is {what}, {wanted}.")


def _llama(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    fields = {**LLAMA_DEFAULTS, **fields}
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if fields.get("head_dim") is not None and fields["head_dim"] * heads != width:
        raise UserError(f"head_dim is {fields['head_dim']} in {CONFIG_FILE}; it is hidden_size / num_attention_heads.")
    options: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads"),
        "rotary_fraction": fields.get("partial_rotary_factor", 1.0),
        "rotary_base": _rotary_base(fields),
    }
    return {
        "layers": (("attention", options),) * fields["num_hidden_layers"],
        "d_model": width,
        "vocab_size": fields["vocab_size"],
        "pad_vocab_multiple": 1,
        "mlp_dim": fields["intermediate_size"],
        "norm_eps": fields["rms_norm_eps"],
        "tie_embeddings": fields["tie_word_embeddings"],
    }


def _rotary_base(fields: Fields) -> float:
    """Return rotary's base, which newer files have in a section; a section may also scale the frequencies."""
    base = fields["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        section = ROPE_SECTION.checked(fields.get(name) or {}, f"{name}.")
        kind = section.get("rope_type", section.get("type", "default"))
        if kind != "default":
            raise UserError(f"{name} is of type {kind!r:.60} in {CONFIG_FILE}; only 'default' is supported.")
        base = section.get("rope_theta", base)
    return base


def _mamba(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    width = fields["hidden_size"]
    options = options_of(fields, MAMBA_KEYS) | {"dt_rank": _rank(fields.get("time_step_rank", "auto"))}
    if "intermediate_size" in fields:
        _one_of("intermediate_size", fields["intermediate_size"], options.get("expand", 2) * width, "expand D")
    return {
        "layers": (("mamba", options),) * fields["num_hidden_layers"],
        "d_model": width,
        "vocab_size": fields["vocab_size"],
        "pad_vocab_multiple": 1,
        "mlp": "none",
        **options_of(fields, {"norm_eps": "layer_norm_epsilon", "tie_embeddings": "tie_word_embeddings"}),
    }


def _rank(value: int | str) -> int | str:
    """Return our rank of dt: 0 for "auto", which is D/16."""
    return 0 if value == "auto" else value


def _mamba_ssm(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    own = SSM_SECTION.checked(fields["ssm_cfg"] or {}, "ssm_cfg.")
    options = options_of(own, SSM_KEYS) | {"dt_rank": _rank(own.get("dt_rank", "auto"))}
    return {
        "layers": (("mamba", options),) * fields["n_layer"],
        "d_model": fields["d_model"],
        "vocab_size": fields["vocab_size"],
        "pad_vocab_multiple": fields.get("pad_vocab_size_multiple", 8),
        "mlp": "none",
        **options_of(fields, {"tie_embeddings": "tie_embeddings"}),
    }


def _rwkv(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    fields = {**RWKV_DEFAULTS, **fields}
    width = fields["hidden_size"]
    if fields.get("attention_hidden_size") is not None:
        _one_of("attention_hidden_size", fields["attention_hidden_size"], width, "hidden_size")
    inner = fields.get("intermediate_size") or 4 * width
    return {
        "layers": (("rwkv4", {}), ("rwkv4_channel_mix", {"expand": inner / width})) * fields["num_hidden_layers"],
        "d_model": width,
        "vocab_size": fields["vocab_size"],
        "pad_vocab_multiple": 1,
        "mlp": "none",
        "norm": "layer",
        "embed_norm": True,
        "tie_embeddings": fields["tie_word_embeddings"],
        **options_of(fields, {"norm_eps": "layer_norm_epsilon"}),
    }


ROPE_SECTION = Keys(
    {"rope_theta": float, "rope_type": str, "type": str},
    harmless=key_names("factor low_freq_factor high_freq_factor original_max_position_embeddings"),
)
SIZES: dict[str, Any] = {"vocab_size": int, "hidden_size": int, "num_hidden_layers": int, "tie_word_embeddings": bool}
LLAMA = Family(
    "a Llama",
    Keys(
        read=SIZES
        | {
            "intermediate_size": int,
            "num_attention_heads": int,
            "num_key_value_heads": int | None,
            "head_dim": int | None,
            "partial_rotary_factor": float,
            "rms_norm_eps": float,
            "rope_theta": float,
            "rope_scaling": dict | None,
            "rope_parameters": dict | None,
        },
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None},
        harmless=key_names("pretraining_tp _attn_implementation"),
    ),
    "num_hidden_layers",
    _llama,
)
MAMBA = Family(
    "a Mamba",
    Keys(
        read=SIZES
        | {
            "state_size": int,
            "conv_kernel": int,
            "expand": int,
            "time_step_rank": int | str,
            "intermediate_size": int,
            "layer_norm_epsilon": float,
        },
        fixed={"hidden_act": "silu", "use_bias": False, "use_conv_bias": True},
        harmless=STEPS_HARMLESS | {"use_mambapy"},
    ),
    "num_hidden_layers",
    _mamba,
)
MAMBA_SSM = Family(
    "a Mamba",
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
    _mamba_ssm,
)
SSM_SECTION = Keys(
    {"d_state": int, "d_conv": int, "expand": int, "dt_rank": int | str},
    {"layer": "Mamba1", "bias": False, "conv_bias": True},
    key_names("dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path"),
)
RWKV = Family(
    "an RWKV-4",
    Keys(
        read=SIZES
        | {"attention_hidden_size": int | None, "intermediate_size": int | None, "layer_norm_epsilon": float},
        harmless=key_names("context_length"),
    ),
    "num_hidden_layers",
    _rwkv,
)

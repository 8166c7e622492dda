"""config.json of the released Based and attention models (HazyResearch/based:based/models/gpt.py), read and written."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from based_jax.convert.fields import Family, Keys, fields_of, key_names, options_of, with_defaults
from based_jax.convert.folders import CONFIG_FILE, Fields
from based_jax.convert.reference import window_from_based
from based_jax.errors import UserError
from based_jax.nn.lm import LMConfig
from based_jax.nn.mixers import mixer_class
from based_jax.nn.mixers.window import WindowConfig

FIRST_MLP_KEY = "transformer.layers.0.mlp.fc1.weight"
HIDDEN_DIM_MULTIPLES = (256, 128, 1)  # the reference's for F; that of some attn-1b weights; our own files are exact
MIXER_MODULES = "based.models.mixers"
CONV_L_MAX = 2048  # the reference's convolution must be given one, and uses none
CONVOLUTION, LINEAR, WINDOW, FEATURE_MAP = "BaseConv", "LinearAttention", "SlidingAttention", "TaylorExp"

# option of our config or mixer -> key
MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "pad_vocab_multiple": "pad_vocab_size_multiple",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
TAYLOR_KEYS = {"num_heads": "num_heads", "feature_dim": "feature_dim"}
CONV_KEYS = {"expand": "expand_proj", "kernel_size": "kernel_size"}
ROTARY_KEYS = {"rotary_fraction": "rotary_emb_fraction", "rotary_base": "rotary_emb_base"}
DEFAULTS: Fields = {"layer_norm_epsilon": 1e-5, "rotary_emb_base": 10000.0}
"""What a config.json without the key means, of what arrays cannot tell."""
WINDOW_DEFAULTS: Fields = {"rotary_emb_fraction": 1.0}  # as other ports read the released files

KEYS = Keys(
    read={
        "n_embd": int,
        "vocab_size": int,
        "n_layer": int,
        "n_head": int,
        "n_inner": int | None,
        "pad_vocab_size_multiple": int,
        "layer_norm_epsilon": float,
        "tie_word_embeddings": bool,
        "rotary_emb_fraction": float,
        "rotary_emb_base": float,
        "alt_mixer_layers": list | None,
        "alt_mixer_2_layers": list | None,
        "mixer": dict | None,
        "alt_mixer": dict | None,
        "alt_mixer_2": dict | None,
        "head_dim": int,
    },
    fixed={
        "activation_function": "swiglu",
        "rms_norm": True,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "lm_head_bias": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "n_head_kv": None,
        "attn_dwconv": False,
        "prenorm": True,
        "parallel_block": False,
        "word_embed_proj_dim": None,
    },
    harmless=key_names(
        "add_cross_attention decay_const decay_denom ff_mult fixed_decay fused_bias_fc fused_dense_sqrelu_dense"
        " fused_dropout_add_ln fused_mlp sequence_parallel special_initializer summary_activation"
        " summary_first_dropout summary_proj_to_labels summary_type summary_use_proj use_fast_path use_weight_init"
        " rotary_dim_int rotary_dim_effective"
    ),
)
SECTION_HARMLESS = frozenset(
    ("_target_", "_partial_", "l_max", "layer_idx", "parallel_implementation", "use_flash_attn")
)
CONV_SECTION = Keys({"expand_proj": int, "kernel_size": int}, {"use_bias": True}, SECTION_HARMLESS | {"kernel_sizes"})
LINEAR_SECTION = Keys(
    {"feature_dim": int, "num_heads": int, "feature_map": dict}, {"head_dim": None, "eps": 1e-12}, SECTION_HARMLESS
)
MAP_SECTION = Keys({"input_dim": int}, {}, SECTION_HARMLESS)
WINDOW_SECTION = Keys({"window_size": int}, {"causal": True}, SECTION_HARMLESS | {"num_heads"})
SECTIONS = {
    "mixer": (CONV_SECTION, CONVOLUTION),
    "alt_mixer": (LINEAR_SECTION, LINEAR),
    "alt_mixer_2": (WINDOW_SECTION, WINDOW),
}

# what else the reference needs to be told to build the same model
WRITTEN_FIELDS = {
    "activation_function": "swiglu",
    "rms_norm": True,
    "scale_attn_by_inverse_layer_idx": False,
    "rotary_emb_interleaved": False,
    "residual_in_fp32": True,
    "max_position_embeddings": 0,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
}


def _values(fields: Fields, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    d_model = fields["n_embd"]
    if "head_dim" in fields and fields["head_dim"] * fields["n_head"] != d_model:
        raise UserError(f"head_dim is {fields['head_dim']} in {CONFIG_FILE}; it is n_embd / n_head.")
    fields = with_defaults(fields, DEFAULTS if fields.get("alt_mixer_2") is None else DEFAULTS | WINDOW_DEFAULTS)
    found = {name: fields[name] for name in SECTIONS if fields.get(name) is not None}
    fields = fields | {name: _checked_section(name, section) for name, section in found.items()}
    return {
        "d_model": d_model,
        "mlp_dim": _hidden_dim(fields, weights),
        "layers": tuple(_layer(fields, index) for index in range(fields["n_layer"])),
        **options_of(fields, MODEL_KEYS),
    }


def _hidden_dim(fields: Fields, weights: Mapping[str, np.ndarray]) -> int:
    """Return F: n_inner, or 8D/3 where it is null, rounded up as the weights of the first layer say."""
    d_model = fields["n_embd"]
    inner = int(8 * d_model / 3) if fields.get("n_inner") is None else fields["n_inner"]
    if inner < 1:
        raise UserError(f"n_inner is {inner} in {CONFIG_FILE}; it is at least 1, or null.")
    rounded = [-(-inner // multiple) * multiple for multiple in HIDDEN_DIM_MULTIPLES]
    stored = weights[FIRST_MLP_KEY].shape if FIRST_MLP_KEY in weights else ()
    return next((F for F in rounded if stored == (2 * F, d_model)), rounded[0])


def _layer(fields: Fields, index: int) -> tuple[str, dict[str, Any]]:
    """Return the mixer of a layer; where its section is null it is attention, as in the reference."""
    if index in (fields.get("alt_mixer_2_layers") or ()):
        return _window(fields) if fields.get("alt_mixer_2") is not None else _attention(fields)
    if index in (fields.get("alt_mixer_layers") or ()):
        own = fields.get("alt_mixer")
        return _attention(fields) if own is None else ("taylor", options_of(own, TAYLOR_KEYS))
    own = fields.get("mixer")
    return _attention(fields) if own is None else ("conv", options_of(own, CONV_KEYS))


def _attention(fields: Fields) -> tuple[str, dict[str, Any]]:
    return "attention", {"num_heads": fields["n_head"], **_rotary(fields)}


def _window(fields: Fields) -> tuple[str, dict[str, Any]]:
    """Return a window, whose heads the reference takes from the model, whatever its section says."""
    window = window_from_based(fields["alt_mixer_2"]["window_size"])
    return "window", {"num_heads": fields["n_head"], "window": window, **_rotary(fields)}


def _rotary(fields: Fields) -> dict[str, Any]:
    return {ours: fields[theirs] for ours, theirs in ROTARY_KEYS.items()}


def _checked_section(name: str, section: Fields) -> Fields:
    keys, target = SECTIONS[name]
    _check_target(name, section, target)
    section = keys.checked(section, f"{name}.")
    if "feature_map" in section:
        feature_map = section["feature_map"]
        _check_target("The feature map", feature_map, FEATURE_MAP)
        input_dim = MAP_SECTION.checked(feature_map, f"{name}.feature_map.").get("input_dim")
        if input_dim is not None and input_dim != section.get("feature_dim"):
            raise UserError(f"input_dim is {input_dim} in {CONFIG_FILE}; it is feature_dim.")
    return section


def _check_target(name: str, section: Fields, target: str) -> None:
    found = section.get("_target_", target)
    if not isinstance(found, str) or found.rpartition(".")[2] != target:
        raise UserError(f"{name} is {found!r:.80} in {CONFIG_FILE}; only {target} is supported.")


def config_json(config: LMConfig) -> Fields:
    """Return the config.json that comes closest to a model."""
    return {
        "n_embd": config.d_model,
        "n_layer": len(config.layers),
        "n_inner": config.hidden_dim,
        **{theirs: getattr(config, ours) for ours, theirs in MODEL_KEYS.items()},
        **WRITTEN_FIELDS,
        **_mixer_fields(config),
    }


def _mixer_fields(config: LMConfig) -> Fields:
    """Return the sections of mixers, and which layers have them; attention is what stands where one is null."""
    kinds = [kind for kind, _ in config.layers]
    found = {kind: mixer_class(kind).Config(**options) for kind, options in config.layers if kind in SECTION_FIELDS}
    names = {kind: name for kind, name in SECTION_NAMES.items() if kind in found}
    if "attention" in found:
        free = [name for name in SECTIONS if name not in names.values()]
        names |= {"attention": free[0]} if free else {}
    heads = next((found[kind] for kind in ("attention", "window", "taylor") if kind in found), WindowConfig())
    rotary = next((found[kind] for kind in ("attention", "window") if kind in found), WindowConfig())
    layers = {name: [i for i, kind in enumerate(kinds) if names.get(kind) == name] for name in SECTIONS}
    return {
        "n_head": heads.num_heads,  # the reference takes a window's heads from here
        **fields_of(rotary, ROTARY_KEYS),
        "alt_mixer_layers": layers["alt_mixer"],
        "alt_mixer_2_layers": layers["alt_mixer_2"],
        **{name: SECTION_FIELDS[kind](found[kind]) for kind, name in names.items()},
    }


def _conv_fields(conv: Any) -> Fields:
    target = f"{MIXER_MODULES}.convolution.{CONVOLUTION}"
    return {"_target_": target, "l_max": CONV_L_MAX, "use_bias": True, **fields_of(conv, CONV_KEYS)}


def _linear_fields(linear: Any) -> Fields:
    module = f"{MIXER_MODULES}.linear_attention"
    feature_map = {"_target_": f"{module}.{FEATURE_MAP}", "input_dim": linear.feature_dim}
    return {"_target_": f"{module}.{LINEAR}", "feature_map": feature_map, **fields_of(linear, TAYLOR_KEYS)}


def _window_fields(window: Any) -> Fields:
    target, size = f"{MIXER_MODULES}.slide_attention.{WINDOW}", 2 * (window.window - 1)
    return {"_target_": target, "num_heads": window.num_heads, "window_size": size, "causal": True}


SECTION_NAMES = {"conv": "mixer", "taylor": "alt_mixer", "window": "alt_mixer_2"}
SECTION_FIELDS: dict[str, Callable[[Any], Fields | None]] = {
    "attention": lambda attention: None,
    "conv": _conv_fields,
    "taylor": _linear_fields,
    "window": _window_fields,
}
FAMILY = Family("HazyResearch/based", KEYS, "n_layer", _values, "based", config_json)

"""Options of mixers of width 16, for those whose defaults are too large there."""

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "bias": True, "out_bias": False, "qk_norm": True},
    "base_conv": {"use_act": True},
    "deltanet": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "num_v_heads": 4, "allow_neg_eigval": True},
    "gla": {"num_heads": 2, "gate_low_rank_dim": 4, "expand_k": 1.0},
    "gsa": {"num_heads": 4, "num_kv_heads": 2, "num_slots": 4, "conv_size": 3},
    "h3": {"d_state": 4, "head_dim": 2},
    "hgrn2": {"expand_ratio": 8, "lower_bound": 0.1, "conv_size": 3},
    "hyena": {"l_max": 64, "filter_order": 8},
    "implicit_conv": {"l_max": 64, "hidden_dim": 4},
    "kda": {"num_heads": 2, "num_v_heads": 4, "head_dim": 4, "conv_size": 0},
    "lightning": {"num_heads": 2},
    "linear": {"num_heads": 2, "feature_dim": 4, "feature_map": "hedgehog"},
    "long_conv": {"l_max": 64},
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 4, "headdim": 8, "ngroups": 2, "bias": True, "conv_bias": False},
    "prefix": {"num_heads": 2, "feature_dim": 4},
    "retnet": {"num_heads": 4, "num_kv_heads": 2},
    "rwkv4": {"attention_dim": 8},
    "rwkv4_channel_mix": {"expand": 2.0},
    "rwkv5": {"head_size": 8},
    "rwkv6": {"num_heads": 2, "proj_low_rank_dim": 2, "gate_low_rank_dim": 4},
    "rwkv7": {"head_dim": 8, **dict.fromkeys(("decay_low_rank_dim", "gate_low_rank_dim", "a_low_rank_dim"), 4)},
    "rwkv7_channel_mix": {"expand": 2.0},
    "simple_gla": {"num_heads": 4, "num_kv_heads": 2},
    "taylor": {"num_heads": 2, "feature_dim": 4},
    "window": {"num_heads": 2, "window": 4},
    "taylor_window": {"num_heads": 4, "num_kv_heads": 2, "window": 3, "sinks": 1, "feature_dim": 4},
}

"""What SmolLM2-135M's layers of attention are swapped for, setting by setting, as configs of the package.

python -m based_jax bench generate --config=experiments/linearize/settings.py:all_w64_k16 --sizes 64x8192
"""

from ml_collections import ConfigDict

LAYERS = 30
HEADS = {"num_heads": 9, "num_kv_heads": 3, "rotary_base": 100000.0}
ATTENTION = ("attention", {**HEADS, "rotary_fraction": 1.0})


def swapped(count, mixer, **options):
    """Return the layers of the model with a mixer in the last ones."""
    return (ATTENTION,) * (LAYERS - count) + ((mixer, {**HEADS, **options}),) * count


SETTINGS = {
    "attention": (ATTENTION,) * LAYERS,
    "last10_w64_k16": swapped(10, "taylor_window", window=64, sinks=1, feature_dim=16),
    "all_w16_k16": swapped(LAYERS, "taylor_window", window=16, sinks=1, feature_dim=16),
    "all_w64_k8": swapped(LAYERS, "taylor_window", window=64, sinks=1, feature_dim=8),
    "all_w64_k16": swapped(LAYERS, "taylor_window", window=64, sinks=1, feature_dim=16),
    "all_w256_k16": swapped(LAYERS, "taylor_window", window=256, sinks=1, feature_dim=16),
    "all_w64": swapped(LAYERS, "window", window=64, sinks=1),
}
"""By name: how many of the last layers, w keys of a window, K components of Taylor attention; `all_w64` has none."""
UNTRAINED = {
    "last10_w64_no_sink": swapped(10, "window", window=64),
    "last10_w64_1_sink": swapped(10, "window", window=64, sinks=1),
    "last10_w64_4_sinks": swapped(10, "window", window=64, sinks=4),
}
"""Windows that read with attention's weights as they are."""


def get_config(variant="all_w64_k16"):
    """Return a model of that setting."""
    layers = {**SETTINGS, **UNTRAINED}[variant]
    sizes = {"d_model": 576, "mlp_dim": 1536, "vocab_size": 49152, "pad_vocab_multiple": 1, "dtype": "bfloat16"}
    return ConfigDict(
        {"model": {"layers": layers, "scan_layers": True, **sizes}, "data": {"kind": "text", "tokenizer": "bytes"}}
    )

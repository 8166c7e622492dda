"""Two layers on MQAR with 64 tokens and 8 key-value pairs: attention, and mixers that are trained with little state."""

from based_jax.sweep import Sweep, chain, param, product

SEGMENT = {"seq_len": 64, "num_kv_pairs": 8}
BASE = {
    "model": {"layers": (), "d_model": 64, "vocab_size": 256, "init_std": 0.1, "dtype": "float32"},
    "data": {
        "kind": "mqar",
        "vocab_size": 256,
        "random_non_queries": False,
        "train": (SEGMENT | {"num_examples": 22400},),
        "test": (SEGMENT | {"num_examples": 640},),
    },
    "optim": {"lr": 4e-3, "warmup_steps": 30, "final_lr": 4e-4},
    "steps": 350,
    "batch_size": 64,
    "log_every": 100,
}


def get_sweep():
    """Return attention with two seeds, and windows and Taylor attention of several sizes."""
    conv = ("conv", {"expand": 2})
    attention = param("model.layers", [(conv, ("attention", {"num_heads": 1}))])
    windows = param("model.layers", [(conv, ("window", {"num_heads": 1, "window": w})) for w in (8, 16, 32)])
    taylor = param("model.layers", [(conv, ("taylor", {"num_heads": 1, "feature_dim": k})) for k in (4, 8)])
    return Sweep(BASE, chain(product(attention, param("seed", [0, 1])), windows, taylor))

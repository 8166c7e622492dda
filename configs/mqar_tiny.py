"""Recall on a laptop: two layers on MQAR with 64 tokens and 8 key-value pairs, under half a minute on 2 CPU cores.

    python -m based_jax train --config=configs/mqar_tiny.py:taylor_8 --workdir=runs/mqar_tiny

Variants: taylor_4, taylor_8, window_8, window_23, attention_64, attention_48, conv_3, conv_8. Taylor attention with
feature dim 4 and 8 has the state bytes of windows of 8 and 23.
"""

from ml_collections import ConfigDict

MIXERS = {
    "taylor": lambda size: ("taylor", {"num_heads": 1, "feature_dim": size}),
    "window": lambda size: ("window", {"num_heads": 1, "window": size}),
    "attention": lambda size: ("attention", {"num_heads": 1}),
    "conv": lambda size: ("conv", {"expand": 2, "kernel_size": size}),
}
VARIANTS = ("taylor_4", "taylor_8", "window_8", "window_23", "attention_64", "attention_48", "conv_3", "conv_8")
SEGMENT = {"seq_len": 64, "num_kv_pairs": 8}


def get_config(variant="taylor_8"):
    """Return a gated convolution below the mixer of the variant; attention's size is its width, all others' is 64."""
    mixer, size = variant.split("_")
    return ConfigDict(
        {
            "model": {
                "layers": (("conv", {"expand": 2}), MIXERS[mixer](int(size))),
                "d_model": int(size) if mixer == "attention" else 64,
                "vocab_size": 256,
                "init_std": 0.1,
                "dtype": "float32",
            },
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
    )

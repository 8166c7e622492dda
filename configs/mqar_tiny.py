"""Based learns recall on a laptop: two layers, 64 tokens with 4 key-value pairs, in half a minute on 2 CPU cores.

python -m based_jax train --config=configs/mqar_tiny.py --workdir=runs/mqar_tiny
"""

from ml_collections import ConfigDict

MIXERS = {
    "taylor": ("taylor", {"num_heads": 1, "feature_dim": 16}),
    "window": ("window", {"num_heads": 1, "window": 8}),
    "conv": ("base_conv", {}),
    "attention": ("attention", {"num_heads": 1}),
}
VARIANTS = tuple(MIXERS)


def get_config(variant="taylor"):
    """Return a short convolution below the mixer that the variant names."""
    return ConfigDict(
        {
            "model": {
                "layers": (("conv", {}), MIXERS[variant]),
                "d_model": 64,
                "vocab_size": 256,
                "dtype": "float32",
            },
            "data": {
                "kind": "mqar",
                "vocab_size": 256,
                "train": ({"num_examples": 32000, "seq_len": 64, "num_kv_pairs": 8},),
                "test": ({"num_examples": 1000, "seq_len": 64, "num_kv_pairs": 8},),
            },
            "optim": {"lr": 5e-3, "warmup_steps": 50, "final_lr": 5e-4},
            "steps": 500,
            "batch_size": 64,
        }
    )

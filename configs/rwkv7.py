"""RWKV-7 (Goose), arXiv 2503.14456, in the shape of 1.3B parameters that its public code has.

    python -m based_jax train --config=configs/rwkv7.py:1b_10b --workdir=runs/rwkv7_1b --config.data.path=FOLDER

Size: 1b (1,336,958,976 parameters); tokens: 10b, 30b, 50b (`recipe.py`). 24 pairs of time and channel mixing; the head
is tied here, and no layer's values lean on the first one's. For one or several accelerators with 80 GB; the default
data is the prose that the package ships, far too little for this size. Source: fla-org/flame:configs/rwkv7_1B.json.
"""

from recipe import config, variants

MODELS = {
    "1b": {
        "layers": (("rwkv7", {"head_dim": 64}), ("rwkv7_channel_mix", {})) * 24,
        "d_model": 2048,
        "mlp": "none",
        "norm": "layer",
        "embed_norm": True,
        "remat": "auto",
    }
}
VARIANTS = variants(MODELS)


def get_config(variant="1b"):
    """Return the architecture with the recipe of the released Based models."""
    return config(MODELS, variant)

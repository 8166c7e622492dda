"""RWKV-5, shaped as the baselines of arXiv 2402.18668, table 1.

    python -m based_jax train --config=configs/rwkv.py:360m_10b --workdir=runs/rwkv_360m --config.data.path=FOLDER

Size: 360m (363,245,568 parameters); tokens: 10b, 30b, 50b (`recipe.py`). The public code has no config of this size:
24 pairs of time and channel mixing with a tied head. For one or several accelerators with 80 GB; the default data is
the prose that the package ships, far too little for this size.
"""

from recipe import config, variants

MODELS = {
    "360m": {
        "layers": (("rwkv5", {}), ("rwkv4_channel_mix", {"expand": 3.1875})) * 24,
        "d_model": 1024,
        "mlp": "none",
        "norm": "layer",
        "embed_norm": True,
        "remat": "auto",
    }
}
VARIANTS = variants(MODELS)


def get_config(variant="360m"):
    """Return the architecture with the recipe of the released models."""
    return config(MODELS, variant)

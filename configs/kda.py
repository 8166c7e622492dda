"""Kimi delta attention, arXiv 2510.26692, in the shape of 1.3B parameters that its public code has as defaults.

    python -m based_jax train --config=configs/kda.py:1b_10b --workdir=runs/kda_1b --config.data.path=FOLDER

Size: 1b (1,362,810,240 parameters); tokens: 10b, 30b, 50b (`recipe.py`). The head is tied here. For one or several
accelerators with 80 GB; the default data is the prose that the package ships, far too little for this size. Source:
fla-org/flash-linear-attention:fla/models/kda/configuration_kda.py.
"""

from recipe import config, variants

MODELS = {
    "1b": {
        "layers": (("kda", {"num_heads": 16, "head_dim": 128}),) * 24,
        "d_model": 2048,
        "mlp_dim": 5632,
        "norm_eps": 1e-6,
        "remat": "auto",
    }
}
VARIANTS = variants(MODELS)


def get_config(variant="1b"):
    """Return the architecture with the recipe of the released Based models."""
    return config(MODELS, variant)

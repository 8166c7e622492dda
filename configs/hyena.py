"""Hyena, shaped as the baselines of arXiv 2402.18668, table 1.

    python -m based_jax train --config=configs/hyena.py:360m_10b --workdir=runs/hyena_360m --config.data.path=FOLDER

Size: 360m (362,147,328 parameters); tokens: 10b, 30b, 50b (`recipe.py`). The public code has no config of this size:
depth and MLP are those of the attention baseline. For one or several accelerators with 80 GB; the default data is the
prose that the package ships, far too little for this size.
"""

from recipe import config, variants

MODELS = {"360m": {"layers": (("hyena", {"l_max": 2048}),) * 24, "d_model": 1024, "mlp_dim": 2816, "remat": "auto"}}
VARIANTS = variants(MODELS)


def get_config(variant="360m"):
    """Return the architecture with the recipe of the released models."""
    return config(MODELS, variant)

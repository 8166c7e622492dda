"""H3, shaped as the baselines of arXiv 2402.18668, table 1.

    python -m based_jax train --config=configs/h3.py:360m_10b --workdir=runs/h3_360m --config.data.path=FOLDER

Size: 360m (363,119,616 parameters); tokens: 10b, 30b, 50b (`recipe.py`). The public code has no config of this size:
24 layers as the attention baseline, the MLP fits the paper's count. For one or several accelerators with 80 GB; the
default data is the prose that the package ships, far too little for this size.
"""

from recipe import config, variants

MODELS = {"360m": {"layers": (("h3", {"d_state": 64}),) * 24, "d_model": 1024, "mlp_dim": 2752, "remat": "auto"}}
VARIANTS = variants(MODELS)


def get_config(variant="360m"):
    """Return the architecture with the recipe of the released models."""
    return config(MODELS, variant)

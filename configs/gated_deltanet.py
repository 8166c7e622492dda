"""Gated DeltaNet, shaped as the baselines of arXiv 2402.18668, table 1.

    python -m based_jax train --config=configs/gated_deltanet.py:360m_10b --workdir=runs/gdn --config.data.path=FOLDER

Size: 360m (358,668,432 parameters); tokens: 10b, 30b, 50b (`recipe.py`). Not in the paper: 18 layers, since its values
are twice as wide, fit the size of the others. For one or several accelerators with 80 GB; the default data is the
prose that the package ships, far too little for this size.
"""

from recipe import config, variants

MODELS = {"360m": {"layers": (("gated_deltanet", {}),) * 18, "d_model": 1024, "mlp_dim": 2816, "remat": "full"}}
VARIANTS = variants(MODELS)


def get_config(variant="360m"):
    """Return the architecture with the recipe of the released models."""
    return config(MODELS, variant)

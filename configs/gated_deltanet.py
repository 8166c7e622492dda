"""Gated DeltaNet, arXiv 2412.06464: shaped as the baselines of arXiv 2402.18668, table 1, and with 1.3B parameters.

    python -m based_jax train --config=configs/gated_deltanet.py:360m_10b --workdir=runs/gdn --config.data.path=FOLDER

Sizes: 360m (358,668,432 parameters) and 1b (1,438,996,224 parameters); tokens: 10b, 30b, 50b (`recipe.py`). Not in the
paper: 18 layers, since its values are twice as wide, fit the size of the others. 1b has 16 heads of 128 in the width,
depth and MLP that fla-org/flash-linear-attention has as defaults for 1.3B. For one or several accelerators with 80 GB;
the default data is the prose that the package ships, far too little for these sizes.
"""

from recipe import config, variants

HEADS_OF_128 = {"num_heads": 16, "expand_k": 1.0, "expand_v": 1.0}
MODELS = {
    "360m": {"layers": (("gated_deltanet", {}),) * 18, "d_model": 1024, "mlp_dim": 2816, "remat": "auto"},
    "1b": {
        "layers": (("gated_deltanet", HEADS_OF_128),) * 24,
        "d_model": 2048,
        "mlp_dim": 5632,
        "norm_eps": 1e-6,
        "remat": "auto",
    },
}
VARIANTS = variants(MODELS)


def get_config(variant="360m"):
    """Return the architecture with the recipe of the released models."""
    return config(MODELS, variant)

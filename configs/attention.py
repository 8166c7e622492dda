"""Transformer++, the attention baseline of the Based paper, arXiv 2402.18668.

    python -m based_jax train --config=configs/attention.py:360m_10b --workdir=runs/attn_360m --config.data.path=FOLDER

Sizes: 360m (359,810,048 parameters) and 1b (1,327,080,720 parameters); tokens: 10b, 30b, 50b (`recipe.py`). For one or
several accelerators with 80 GB; the default data is the prose that the package ships, far too little for these sizes.
Source: HazyResearch/based:train/configs/experiment/reference.
"""

from recipe import config, variants

COMMON = {"pad_vocab_multiple": 16, "remat": "auto"}
MODELS = {
    "360m": {"layers": (("attention", {"num_heads": 16}),) * 24, "d_model": 1024, "mlp_dim": 2816, **COMMON},
    "1b": {"layers": (("attention", {"num_heads": 24}),) * 36, "d_model": 1680, "mlp_dim": 4608, **COMMON},
}
VARIANTS = variants(MODELS)


def get_config(variant="360m"):
    """Return the released architecture and recipe."""
    return config(MODELS, variant)

"""Mamba, the recurrent baseline of the Based paper, arXiv 2402.18668.

    python -m based_jax train --config=configs/mamba.py:360m_10b --workdir=runs/mamba_360m --config.data.path=FOLDER

Sizes: 360m (358,190,080 parameters) and 1b (1,319,311,360 parameters); tokens: 10b, 30b, 50b (`recipe.py`). For one or
several accelerators with 80 GB; the default data is the prose that the package ships, far too little for these sizes.
Its vocabulary is GPT-NeoX's size with GPT-2's tokens. Source: HazyResearch/based:train/configs/experiment/reference.
"""

from recipe import config, variants

COMMON = {
    "layers": (("mamba", {}),) * 46,
    "mlp": "none",
    "vocab_size": 50277,
    "pad_vocab_multiple": 16,
    "remat": "auto",
}
MODELS = {"360m": {"d_model": 1024, **COMMON}, "1b": {"d_model": 2048, **COMMON}}
VARIANTS = variants(MODELS)


def get_config(variant="360m"):
    """Return the released architecture and recipe."""
    return config(MODELS, variant)

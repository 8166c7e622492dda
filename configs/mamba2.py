"""Mamba-2, arXiv 2405.21060, in the shape of its released model of 1.3B parameters.

    python -m based_jax train --config=configs/mamba2.py:1b_10b --workdir=runs/mamba2_1b --config.data.path=FOLDER

Size: 1b (1,343,757,312 parameters); tokens: 10b, 30b, 50b (`recipe.py`). For one or several accelerators with 80 GB;
the default data is the prose that the package ships, far too little for this size. Its vocabulary is GPT-NeoX's size
with GPT-2's tokens. Source: state-spaces/mamba:mamba_ssm/models/config_mamba.py; fla-org/flame:configs/mamba2_1B.json.
"""

from recipe import config, variants

MODELS = {
    "1b": {
        "layers": (("mamba2", {}),) * 48,
        "d_model": 2048,
        "mlp": "none",
        "vocab_size": 50277,
        "pad_vocab_multiple": 16,
        "remat": "auto",
    }
}
VARIANTS = variants(MODELS)


def get_config(variant="1b"):
    """Return the architecture with the recipe of the released Based models."""
    return config(MODELS, variant)

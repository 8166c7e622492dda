"""Based, arXiv 2402.18668.

    python -m based_jax train --config=configs/based.py:360m_10b --workdir=runs/based_360m --config.data.path=FOLDER

Sizes: 360m (362,620,928 parameters) and 1b (1,349,453,056 parameters); tokens: 10b, 30b, 50b (`recipe.py`). For one or
several accelerators with 80 GB; the default data is the prose that the package ships, far too little for these sizes.
Source: HazyResearch/based:train/configs/experiment/reference.
"""

from recipe import config, variants

WINDOW = 129  # the reference's window_size of 256: half of it to the left, and the query's own key


def layers(depth, taylor):
    """Return a Taylor layer at each index of `taylor`, a window after each of them, gated convolutions elsewhere."""

    def layer(i):
        if i in taylor:
            return "taylor", {}
        return ("window", {"window": WINDOW}) if i - 1 in taylor else ("conv", {})

    return tuple(layer(i) for i in range(depth))


MODELS = {
    "360m": {"layers": layers(27, taylor=(1, 6, 11, 16, 21)), "d_model": 1024, "remat": "auto"},
    "1b": {"layers": layers(36, taylor=(1, 6, 11, 16, 21, 27, 33)), "d_model": 1792, "remat": "auto"},
}
VARIANTS = variants(MODELS)


def get_config(variant="360m"):
    """Return the released architecture and recipe."""
    return config(MODELS, variant)

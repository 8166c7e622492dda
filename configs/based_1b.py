"""Based at 1.3B of the paper (arXiv 2402.18668): 1,349,453,056 parameters.

    python -m based_jax train --config=configs/based_1b.py:10b --workdir=runs/based_1b --config.data.path=FOLDER

For one or several accelerators with 80 GB; the default data is the prose that the package ships, far too little for
this size. Source: HazyResearch/based:train/configs/experiment/reference. Variants: 10b, 30b, 50b tokens.
"""

from ml_collections import ConfigDict

STEPS = {"10b": 20_000, "30b": 60_000, "50b": 100_000}
VARIANTS = tuple(STEPS)
TAYLOR = (*range(1, 22, 5), 27, 33)
WINDOW = 129  # the reference's window_size of 256: half of it to the left, and the query's own key


def get_config(variant="10b"):
    """Return the released architecture and recipe: a window after each Taylor layer, gated convolutions elsewhere."""

    def layer(i):
        if i in TAYLOR:
            return "taylor", {}
        return ("window", {"window": WINDOW}) if i - 1 in TAYLOR else ("conv", {})

    steps = STEPS[variant]
    return ConfigDict(
        {
            "model": {
                "layers": tuple(layer(i) for i in range(36)),
                "d_model": 1792,
                "scan_layers": True,
                "remat": "dots",
            },
            "data": {"kind": "text"},
            "optim": {"warmup_steps": steps // 100},
            "steps": steps,
            "batch_size": 256,
            "microbatches": 32,
        }
    )

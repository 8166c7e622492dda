"""Gated DeltaNet at 360M, shaped as the baselines of arXiv 2402.18668, table 1: 358,668,432 parameters.

    python -m based_jax train --config=configs/gated_deltanet_360m.py:10b --workdir=runs/gdn --config.data.path=FOLDER

Not in the paper: 18 layers, since its values are twice as wide, fit the size of the others. For one or several
accelerators with 80 GB; the default data is the prose that the package ships, far too little for this size. Variants:
10b, 30b, 50b tokens.
"""

from ml_collections import ConfigDict

STEPS = {"10b": 20_000, "30b": 60_000, "50b": 100_000}
VARIANTS = tuple(STEPS)


def get_config(variant="10b"):
    """Return the architecture with the recipe of the released models."""
    steps = STEPS[variant]
    return ConfigDict(
        {
            "model": {
                "layers": (("gated_deltanet", {}),) * 18,
                "d_model": 1024,
                "mlp_dim": 2816,
                "scan_layers": True,
                "remat": "full",
            },
            "data": {"kind": "text"},
            "optim": {"warmup_steps": steps // 100},
            "steps": steps,
            "batch_size": 256,
            "microbatches": 32,
        }
    )

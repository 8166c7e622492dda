"""Gated linear attention at 360M, shaped as the baselines of arXiv 2402.18668, table 1: 360,410,112 parameters.

    python -m based_jax train --config=configs/gla_360m.py:10b --workdir=runs/gla_360m --config.data.path=FOLDER

The public code has no config of this size: depth and MLP are those of the attention baseline. For one or several
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
                "layers": (("gla", {}),) * 24,
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

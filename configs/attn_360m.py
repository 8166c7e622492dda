"""Transformer++, the attention baseline of the Based paper at 360M (arXiv 2402.18668): 359,810,048 parameters.

    python -m based_jax train --config=configs/attn_360m.py:10b --workdir=runs/attn_360m --config.data.path=FOLDER

For one or several accelerators with 80 GB; the default data is the prose that the package ships, far too little for
this size. Source: HazyResearch/based:train/configs/experiment/reference. Variants: 10b, 30b, 50b tokens.
"""

from ml_collections import ConfigDict

STEPS = {"10b": 20_000, "30b": 60_000, "50b": 100_000}
VARIANTS = tuple(STEPS)


def get_config(variant="10b"):
    """Return the released architecture and recipe."""
    steps = STEPS[variant]
    return ConfigDict(
        {
            "model": {
                "layers": (("attention", {"num_heads": 16}),) * 24,
                "d_model": 1024,
                "mlp_dim": 2816,
                "pad_vocab_multiple": 16,
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

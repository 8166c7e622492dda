"""Mamba, the recurrent baseline of the Based paper, at 1.3B (arXiv 2402.18668): 1,319,311,360 parameters.

    python -m based_jax train --config=configs/mamba_1b.py:10b --workdir=runs/mamba_1b --config.data.path=FOLDER

For one or several accelerators with 80 GB; the default data is the prose that the package ships, far too little for
this size. Source: HazyResearch/based:train/configs/experiment/reference. Variants: 10b, 30b, 50b tokens.
"""

from ml_collections import ConfigDict

STEPS = {"10b": 20_000, "30b": 60_000, "50b": 100_000}
VARIANTS = tuple(STEPS)


def get_config(variant="10b"):
    """Return the released architecture and recipe; its vocabulary is GPT-NeoX's size with GPT-2's tokens."""
    steps = STEPS[variant]
    return ConfigDict(
        {
            "model": {
                "layers": (("mamba", {}),) * 46,
                "d_model": 2048,
                "mlp": "none",
                "vocab_size": 50277,
                "pad_vocab_multiple": 16,
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

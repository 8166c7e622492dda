"""A small Based language model on the shipped English prose, byte by byte, in about two minutes on 2 CPU cores.

    python -m based_jax train --config=configs/text_tiny.py --workdir=runs/text_tiny

Expected: validation perplexity per byte from about 270 down to below 6.
"""

from ml_collections import ConfigDict


def get_config():
    """Return one pattern of convolution, Taylor attention and a window of 32 keys."""
    pattern = (
        ("conv", {"expand": 2}),
        ("taylor", {"num_heads": 4, "feature_dim": 8}),
        ("window", {"num_heads": 4, "window": 32}),
    )
    return ConfigDict(
        {
            "model": {"layers": pattern, "d_model": 128, "vocab_size": 257, "init_std": 0.05, "dtype": "float32"},
            "data": {"kind": "text", "tokenizer": "bytes", "seq_len": 128},
            "optim": {"lr": 3e-3, "warmup_steps": 50, "final_lr": 3e-4},
            "steps": 500,
            "batch_size": 16,
            "log_every": 100,
        }
    )

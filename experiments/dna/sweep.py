"""Every variant of `configs/dna.py`, as whole runs: 8,192 bases a row first, then 32,768."""

from pathlib import Path

from flax.traverse_util import flatten_dict

from based_jax import config as configs
from based_jax.sweep import Sweep

CONFIG = Path(__file__).parents[2] / "configs" / "dna.py"
VARIANTS = tuple(f"{model}_{length}" for length in ("8k", "32k") for model in ("based", "attention", "mamba", "hyena"))
OF_A_VARIANT = ("model.layers", "model.mlp", "model.mlp_dim", "data.seq_len", "data.test_lengths", "batch_size")


def point(variant):
    """Return what a variant sets."""
    values = flatten_dict(configs.load(f"{CONFIG}:{variant}").to_dict(), sep=".")
    return {key: values[key] for key in OF_A_VARIANT if key in values}


def get_sweep():
    """Return all variants over what they share."""
    base = configs.load(f"{CONFIG}:{VARIANTS[0]}").to_dict()
    base["model"] = {key: base["model"][key] for key in ("d_model", "vocab_size")}
    return Sweep(base, [point(variant) for variant in VARIANTS])

"""Two layers on MQAR with 64 tokens and 8 key-value pairs: attention, and mixers that are trained with little state."""

from pathlib import Path

from based_jax import config as configs
from based_jax.sweep import Sweep, chain, param, product

BASE = configs.load(f"{Path(__file__).parents[2] / 'configs' / 'mqar_tiny.py'}:attention_64").to_dict()
"""Whose layers are those of each point."""


def get_sweep():
    """Return attention with two seeds, and windows and Taylor attention of several sizes."""
    conv = ("conv", {"expand": 2})
    attention = param("model.layers", [(conv, ("attention", {"num_heads": 1}))])
    windows = param("model.layers", [(conv, ("window", {"num_heads": 1, "window": w})) for w in (8, 16, 32)])
    taylor = param("model.layers", [(conv, ("taylor", {"num_heads": 1, "feature_dim": k})) for k in (4, 8)])
    return Sweep(BASE, chain(product(attention, param("seed", [0, 1])), windows, taylor))

"""A sweep that a laptop finishes in a minute, and what the mixers of this package came to on it.

MQAR with 64 tokens and 8 key-value pairs, as `configs/mqar_tiny.py` and the demo have it: a gated convolution below the
mixer, width 64, one pass over 22,400 examples. Each mixer has two learning rates, of which a picture takes the best.
"""

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from based_jax.nn.mixers import kind_of
from based_jax.sweep import Point, Sweep, chain, param, product

CONV = ("conv", {"expand": 2})
SEGMENT = {"seq_len": 64, "num_kv_pairs": 8}
BASE: dict[str, Any] = {
    "model": {"layers": (), "d_model": 64, "vocab_size": 256, "init_std": 0.1, "dtype": "float32"},
    "data": {
        "kind": "mqar",
        "vocab_size": 256,
        "random_non_queries": False,
        "train": (SEGMENT | {"num_examples": 22400},),
        "test": (SEGMENT | {"num_examples": 640},),
    },
    "optim": {"lr": 4e-3, "warmup_steps": 30, "final_lr": 4e-4},
    "epochs": 1,
    "batch_size": 64,
}
RATES = (2e-3, 4e-3)
COMMITTED: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("taylor", {"num_heads": 1, "feature_dim": size}) for size in (4, 8, 16)),
    *(("window", {"num_heads": 1, "window": size}) for size in (8, 23, 48)),
    ("attention", {"num_heads": 1}),
    *(("linear", {"num_heads": 1, "feature_dim": size, "feature_map": "relu"}) for size in (16, 64)),
    ("retnet", {"num_heads": 2, "expand_v": 1.0}),
    ("gla", {"num_heads": 2}),
    ("mamba2", {"d_state": 16, "headdim": 32}),
    ("conv", {"expand": 2}),
)
"""The mixers of `rows.jsonl`, with their options."""


def points(mixer: str | type, options: Mapping[str, Any]) -> list[Point]:
    """Return the points of a mixer, by name or class, with these options."""
    return product(param("model.layers", [(CONV, (kind_of(mixer), dict(options)))]), param("optim.lr", RATES))


def sweep_of(
    mixer: str | type, several: Iterable[Mapping[str, Any]], overrides: Mapping[str, Any] | None = None
) -> Sweep:
    """Return the sweep of a mixer at several options; `overrides` of config keys hold for all its points."""
    found = chain(*(points(mixer, options) for options in several))
    return Sweep(BASE, product(found, [dict(overrides or {})]))


def committed_sweep() -> Sweep:
    """Return the sweep of the package's mixers."""
    return Sweep(BASE, chain(*(points(mixer, options) for mixer, options in COMMITTED)))


def committed_rows() -> list[dict[str, Any]]:
    """Return the rows that the package's mixers came to."""
    text = (resources.files("based_jax.newcomer") / "assets" / "rows.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

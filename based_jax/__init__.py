"""Based and the sequence mixers it is compared with, in JAX.

The names below are imported when they are first used, so that importing the package is quick and starts no backend.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "LM": "based_jax.nn.lm",
    "LMConfig": "based_jax.nn.lm",
    "MIXERS": "based_jax.nn.mixers",
    "TrainConfig": "based_jax.train.run",
    "UserError": "based_jax.errors",
    "attention": "based_jax.ops",
    "load_config": "based_jax.train.run",
    "load_run": "based_jax.train.run",
    "make_mixer": "based_jax.nn.mixers",
    "short_conv": "based_jax.ops",
    "taylor_attention": "based_jax.ops",
    "window_attention": "based_jax.ops",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'based_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__

"""Configs: a Python file returns a ConfigDict, overrides change it, and frozen dataclasses check and complete it.

Defaults live in the dataclasses only. A config file holds what differs from them and imports nothing from the package,
but may import files of its own folder. A value that follows another is a reference:

    VARIANTS = {"small": {"d_model": 64}, "large": {"d_model": 512}}      # optional: the names after the colon

    def get_config(variant="small"):
        config = ml_collections.ConfigDict({"model": VARIANTS[variant], "optim": {}, "steps": 1000})
        config.optim.warmup_steps = config.get_ref("steps") // 100
        return config
"""

from based_jax.config.checks import build, check_types, errors_within, plain, shown
from based_jax.config.files import call_in_file, class_in_file, load, overridden
from based_jax.config.keys import Key, keys_of, meant_key
from based_jax.config.saving import (
    CONFIG_FILE,
    added_later,
    check_same,
    config_id,
    every_value,
    is_under,
    known_texts,
    read,
    save,
    to_dict,
)

__all__ = [
    "CONFIG_FILE",
    "Key",
    "added_later",
    "build",
    "call_in_file",
    "check_same",
    "check_types",
    "class_in_file",
    "config_id",
    "errors_within",
    "every_value",
    "is_under",
    "keys_of",
    "known_texts",
    "load",
    "meant_key",
    "overridden",
    "plain",
    "read",
    "save",
    "shown",
    "to_dict",
]

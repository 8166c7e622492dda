"""Keys of a published config.json: each is read, has one value here, or has no part in what a model computes."""

import logging
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from based_jax.convert.folders import CONFIG_FILE, Fields
from based_jax.errors import UserError
from based_jax.nn.lm_config import LMConfig

log = logging.getLogger(__name__)

OWN_SECTION = "based_jax"
"""Of what no other reader looks for: the tokenizer's name, and what training alone asks of a config."""
PADDING_FIELDS = ("vocab_size", "pad_vocab_multiple")
"""What stands there as well where `vocab_size` is that of the padded embedding."""
SAME_FOR_ALL: dict[str, Any] = {"quantization_config": None, "is_encoder_decoder": False, "add_cross_attention": False}
"""Keys of any family that change what is computed, with the one value that is supported."""
LARGEST_SIZE = 2**24
"""Above what any model has of anything: shapes of such sizes cannot even be spoken of."""


def key_names(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


HARMLESS = key_names(
    "_name_or_path architectures attention_dropout attn_pdrop auto_map bos_token_id dtype embd_pdrop eos_token_id"
    " initializer_range max_position_embeddings model_type n_ctx n_positions pad_token_id reorder_and_upcast_attn"
    " rescale_every rescale_prenorm_residual resid_pdrop residual_in_fp32 torch_dtype transformers_version use_cache"
    " use_flash_attn unk_token_id"
) | {OWN_SECTION}
"""Keys that all families may have: names, token ids, initial values, dropout, dtypes and implementations."""


class Keys(NamedTuple):
    """What is known of the keys of a section.

    Attributes:
      read: the type of each key that becomes a part of the config; a float may be written as an int.
      fixed: keys that change what is computed and of which one value is supported, which is also what is meant without
        the key.
      harmless: others that do not.
    """

    read: Mapping[str, type | types.UnionType]
    fixed: Mapping[str, Any] = {}
    harmless: frozenset[str] = frozenset()

    def checked(self, fields: Fields, where: str = "") -> Fields:
        """Return the keys that are read, after a warning of those that are unknown.

        Raises:
          UserError: a value of a fixed key is not supported.
          TypeError: a value is of another type.
        """
        fixed = SAME_FOR_ALL | dict(self.fixed)
        for key, value in fields.items():
            if key in fixed and value != fixed[key]:
                allowed = fixed[key]
                raise UserError(f"{where}{key} is {value!r:.60} in {CONFIG_FILE}; only {allowed!r} is supported.")
            if key in self.read and not _has_type(value, self.read[key]):
                kind = getattr(self.read[key], "__name__", str(self.read[key]))
                raise TypeError(f"{where}{key} is {value!r:.60}, which is no {kind} of a model")
        known = self.read.keys() | fixed.keys() | self.harmless | HARMLESS
        if unknown := sorted(where + key for key in fields.keys() - known):
            log.warning("%s has keys that are not known here and are left out: %s.", CONFIG_FILE, ", ".join(unknown))
        return {
            key: float(fields[key]) if kind is float else fields[key]
            for key, kind in self.read.items()
            if key in fields
        }


class Family(NamedTuple):
    """Published models of one kind, and what their folders hold.

    Attributes:
      title: what they are, for messages.
      keys: of their config.json.
      num_layers: the key of the number of layers.
      values: returns the values of an `LMConfig` from a config.json that was checked and the arrays.
      skeleton: the entry of `reference.SKELETONS` that their arrays are written under.
      fields: returns the config.json that comes closest to a model; None where folders are read alone.
    """

    title: str
    keys: Keys
    num_layers: str
    values: Callable[[Fields, Mapping[str, np.ndarray]], dict[str, Any]]
    skeleton: str = ""
    fields: Callable[[LMConfig], Fields] | None = None


def with_defaults(fields: Fields, defaults: Fields) -> Fields:
    """Return the fields with the published class's values of keys that a file leaves out, after a warning of these."""
    absent = {key: value for key, value in defaults.items() if key not in fields}
    if absent:
        taken = ", ".join(f"{key} {value!r}" for key, value in absent.items())
        log.warning("%s leaves out %s: taken as its publication's code does.", CONFIG_FILE, taken)
    return absent | fields


def options_of(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """Return our options whose keys are there; the others keep our defaults."""
    return {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}


def _has_type(value: Any, kind: type | types.UnionType) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int | float) and not abs(value) < (LARGEST_SIZE if kind is not float else math.inf):
        return False
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


def padding_section(config: LMConfig) -> Fields:
    """Return a section of our own for a config.json that tells the rows of the embedding, and not which have no id."""
    padding = {name: getattr(config, name) for name in PADDING_FIELDS}
    return {OWN_SECTION: padding} if config.pad_vocab_multiple > 1 else {}


def fields_of(options: Any, names: Mapping[str, str]) -> Fields:
    """Return the keys of our options, the inverse of `options_of`."""
    return {theirs: getattr(options, ours) for ours, theirs in names.items()}

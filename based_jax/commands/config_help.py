"""What `--help` says of a config: how its keys are set, and each key with its type, default and meaning."""

import dataclasses
import itertools
import re
import textwrap
import typing
from typing import Any, Literal

from based_jax.config import keys_of

WIDTH = 100
OVERRIDES = """\
config keys:
  --config.KEY=VALUE changes what the file says; VALUE is a Python literal, or else a string; quote it for the shell:
    --config.optim.lr=1e-3 --config.data.tokenizer=bytes --config.model.final_norm=None
    --config.model.layers="(('conv', {}), ('taylor', {'num_heads': 2}))"
  Values that follow others, as the warmup follows the steps in many files, follow what is given here.
"""


def config_help(cls: type) -> str:
    """Return how to override a config, and all keys of its class, those of a choice below that."""
    parts, told = [OVERRIDES], set()
    keys = sorted(keys_of(cls), key=lambda key: bool(key.condition))
    for condition, group in itertools.groupby(keys, key=lambda key: key.condition):
        space = "    " if condition else "  "
        if condition:
            parts.append(f"  with {condition}:")
        for key in group:
            parts.append(f"{space}{key.name}: {_type_name(key.kind)}{_default(key.default)}")
            if key.meaning and (key.name, key.meaning) not in told:
                parts.append(textwrap.indent(textwrap.fill(key.meaning, WIDTH), f"{space}    "))
            told.add((key.name, key.meaning))
    return "\n".join(parts) + "\n"


def options_help(mixers: dict[str, Any]) -> str:
    """Return the options of every mixer with their defaults, as they stand in a list of layers."""
    lines = ["options of each mixer in model.layers:"]
    for kind, mixer in mixers.items():
        options = ", ".join(f"'{field.name}': {field.default!r}" for field in dataclasses.fields(mixer.Config))
        lines.append(textwrap.fill(f"('{kind}', {{{options}}})", WIDTH, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    return "" if value is dataclasses.MISSING else f" = {value!r}"


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return re.sub(r"\b[a-z_]\w*(\.\w+)*\.(?=[A-Z])", "", str(kind)) if typing.get_args(kind) else kind.__name__

"""Files of weights: JSON and arrays in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from based_jax.convert.torch_files import read_tensors
from based_jax.errors import UserError
from based_jax.folders import check_file, read_file, reason

Fields = dict[str, Any]
"""An object of a JSON file."""

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    WEIGHTS_FILE: load_file,
    "pytorch_model.bin": read_tensors,
}
"""Where a folder has its weights, the first that is there: each in one file, or in shards that an index names."""


def read_json(path: Path) -> Fields:
    """Return the object of a JSON file.

    Raises:
      UserError: it is missing, unreadable, or no JSON object.
    """
    try:
        fields = json.loads(read_file(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read: {reason(error)}.") from None
    if not isinstance(fields, dict):
        raise UserError(f"'{path}' holds a {type(fields).__name__}; it is a JSON object.")
    return fields


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a folder.

    Raises:
      UserError: there are none, a file of theirs is missing or damaged, two hold the same array, or there are both one
        file and shards.
    """
    found = [name for name in READERS if _index(folder, name).exists() or (folder / name).exists()]
    if not found:
        raise UserError(f"'{folder}' has no weights: neither {' nor '.join(READERS)}, nor an index of their shards.")
    name, index = found[0], _index(folder, found[0])
    weights: dict[str, np.ndarray] = {}
    files = _shards(index) if index.exists() else [name]
    if (folder / name).exists() and name not in files:
        raise UserError(f"'{folder}' has weights twice: {name} and the shards that {index.name} names; remove either.")
    for file in files:
        arrays = _read_arrays(folder / file, READERS[name])
        if twice := sorted(arrays.keys() & weights.keys()):
            raise UserError(f"'{folder / file}' holds '{twice[0]}', which another file holds as well.")
        weights |= arrays
    return weights


def _index(folder: Path, name: str) -> Path:
    return folder / f"{name}.index.json"


def _shards(index: Path) -> list[str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"'{index}' has no weight_map, which names the file of each array.")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"'{index}' names the file {file!r:.60}; it is the name of a file beside it.")
    return sorted(set(files.values()))


def _read_arrays(path: Path, read: Callable[[Path], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    try:
        check_file(path)
        return read(path)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy does not have
        raise UserError(f"'{path}' cannot be read: {reason(error)}.") from None

"""The state of one sequence as an object: what a model has read, apart from any batch and from room for more."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from based_jax.errors import UserError
from based_jax.folders import check_file, local_path, reason, written_whole

FORMAT, VERSION = "based_jax_state", 1
"""The key of a file's metadata under which all but the arrays stands, and what its layout is called."""


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What a model keeps of one sequence. Nothing changes it: to go on is to fork it (`StateLayout.fork`).

    States are equal where every bit of them is.

    Attributes:
      arrays: of each layer's cache, without the axis of the rows: "layers/0/state/..." is of the first layer.
      kinds: the mixer of each layer.
      length: tokens read.
      model: the fingerprint of the model whose state it is (`state_layout.fingerprint`).
    """

    arrays: Mapping[str, jax.Array | np.ndarray]
    kinds: tuple[str, ...]
    length: int
    model: str

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in self.arrays.values())

    def layer(self, index: int) -> dict[str, jax.Array | np.ndarray]:
        """Return the arrays of a layer, by their names within its cache."""
        start = f"layers/{index}/"
        return {name.removeprefix(start): x for name, x in self.arrays.items() if name.startswith(start)}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        return self._facts() == other._facts() and all(
            _bits(x).tobytes() == _bits(other.arrays[name]).tobytes() for name, x in self.arrays.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def save(self, file: str | os.PathLike) -> None:
        """Write the state as a file of safetensors, whole or not at all.

        Raises:
          UserError: the file exists, or cannot be written.
        """
        with written_whole(local_path(file, "file")) as part:
            facts = self._facts()
            metadata = {FORMAT: json.dumps(facts | {"digest": _digest(facts, self.arrays)})}
            save_file({name: _storable(x) for name, x in self.arrays.items()}, part, metadata)

    @classmethod
    def load(cls, file: str | os.PathLike) -> "State":
        """Return the state of a file that `save` wrote, bitwise, as numpy arrays.

        Raises:
          UserError: the file is missing, unreadable or damaged, or something else than a state.
        """
        path = local_path(file, "file")
        facts, stored = _read(path)
        try:
            digest = facts.pop("digest")
            arrays = {name: stored[name].view(jnp.dtype(dtype)) for name, (dtype, _) in facts["arrays"].items()}
            state = cls(arrays, tuple(facts["kinds"]), facts["length"], facts["model"])
            whole = type(state.length) is int and stored.keys() == arrays.keys() and state._facts() == facts
            whole = whole and _digest(facts, arrays) == digest
        except (KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"'{path}' is damaged: it does not hold what was saved; save the state again.")
        return state

    def _facts(self) -> dict[str, Any]:
        """Return all but the values of the arrays, as JSON has it."""
        arrays = {name: [str(x.dtype), list(x.shape)] for name, x in sorted(self.arrays.items())}
        own = {"kinds": list(self.kinds), "length": self.length, "model": self.model}
        return {"version": VERSION, **own, "arrays": arrays}


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """What a layer keeps of a sequence; the norm is that of all its numbers but integers, a vector's."""

    layer: int
    mixer: str
    elements: int
    bytes: int
    norm: float


def inspect(state: State) -> list[LayerFacts]:
    """Return a row for each layer."""
    return [_layer_facts(i, kind, list(state.layer(i).values())) for i, kind in enumerate(state.kinds)]


def _layer_facts(index: int, kind: str, arrays: list) -> LayerFacts:
    numbers = [np.asarray(x, np.float64) for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    norm = math.sqrt(sum(float(np.sum(x * x)) for x in numbers))
    return LayerFacts(index, kind, sum(x.size for x in arrays), sum(x.nbytes for x in arrays), norm)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the facts and the stored arrays of a file."""
    try:
        check_file(path)
        path.open("rb").close()  # what refuses it is told by the file system's name
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(FORMAT)
            arrays = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
        facts = json.loads(text) if text else None
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read as a state: {reason(error)}.") from None
    if not isinstance(facts, dict):
        raise UserError(f"'{path}' is no state of a sequence; `generate --save-state` writes one.")
    if facts.get("version") != VERSION:
        raise UserError(f"'{path}' is a state of version {facts.get('version')!r:.20}; this one reads {VERSION}.")
    return facts, arrays


def _bits(x: jax.Array | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _digest(facts: Mapping[str, Any], arrays: Mapping[str, jax.Array | np.ndarray]) -> str:
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(_bits(arrays[name]).data)
    return digest.hexdigest()


def _storable(x: jax.Array | np.ndarray) -> np.ndarray:
    """Return the array as safetensors writes it with numpy, which has no floats of 8 bits."""
    x = np.array(x, order="C")
    return x.view(np.uint8) if x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.floating) else x

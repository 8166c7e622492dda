"""The package's command, with the digest of every batch that this process feeds to its devices in a file.

python -m experiments.several_gpus.fed FILE train --config=...
"""

import hashlib
import json
import runpy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from based_jax.train import loop


def digest(batch: dict[str, Any]) -> str:
    """Return the SHA-256 of what of a batch lies on this process' devices."""
    found = hashlib.sha256()
    for name in sorted(batch):
        for shard in batch[name].addressable_shards:
            found.update(f"{name} {shard.index}".encode())
            found.update(np.ascontiguousarray(shard.data).tobytes())
    return found.hexdigest()


def recording(path: str, read_ahead: Callable) -> Callable:
    """Return `read_ahead` of which each batch that is read leaves a line in a file."""

    def recorded(read: Callable[[int], dict[str, Any]], steps: Iterable[int]) -> Any:
        def read_and_write(step: int) -> dict[str, Any]:
            batch = read(step)
            with open(path, "a") as file:
                print(json.dumps({"step": step, "sha256": digest(batch)}), file=file)
            return batch

        return read_ahead(read_and_write, steps)

    return recorded


if __name__ == "__main__":
    loop.read_ahead = recording(sys.argv.pop(1), loop.read_ahead)  # type: ignore[assignment]
    runpy.run_module("based_jax", run_name="__main__", alter_sys=True)

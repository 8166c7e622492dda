"""What all processes of a run are given alike, compared before they compute together: others would wait for ever."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from based_jax.errors import UserError

MAX_DIFFERENCES_SHOWN = 3


def check_alike(values: Mapping[str, Any]) -> None:
    """Check that this process has the values that process 0 has; all processes call it together.

    Args:
      values: what JSON holds, by names for a message.

    Raises:
      UserError: some differ; the other processes hear of it by `hosts`.
    """
    if jax.process_count() == 1:
        return
    own = json.loads(json.dumps(values))
    first = json.loads(_of_process_0(json.dumps(values)))
    differences = [
        f"{name} is {first.get(name)!r:.80} in process 0 and {own.get(name)!r:.80} in process {jax.process_index()}"
        for name in sorted(own | first)
        if own.get(name) != first.get(name)
    ]
    if differences:
        hidden = len(differences) - MAX_DIFFERENCES_SHOWN
        more = f", and {hidden} more differ" if hidden > 0 else ""
        shown = ", ".join(differences[:MAX_DIFFERENCES_SHOWN])
        raise UserError(f"{shown}{more}; all processes of a run have the same.")


def _of_process_0(text: str) -> str:
    letters = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(letters.size)))
    return np.asarray(multihost_utils.broadcast_one_to_all(np.resize(letters, size)), np.uint8).tobytes().decode()

"""The mask of a window as splash attention asks for it, block by block, in a time that does not grow with the block."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import LocalMask


class Band(LocalMask):
    """Which keys queries see of a sequence: `window` up to their own place, and the first `sinks`.

    Of a block in which all or none are seen it says so without comparing each pair: most blocks of a long sequence.
    """

    def __init__(self, time: int, window: int, sinks: int = 0):
        super().__init__((time, time), (window - 1, 0), 0)
        self.window, self.sinks = window, sinks
        if sinks:
            self.mask_function = functools.partial(_with_sinks, self.mask_function, sinks)

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same mask, so that heads share what is made of it."""
        return isinstance(other, Band) and super().__eq__(other) and self.sinks == other.sinks

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.sinks))

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """Return the mask of a block of queries and keys."""
        queries, keys = (range(*part.indices(size)) for part, size in zip(block, self.shape, strict=True))
        if keys[0] < self.sinks:
            return super().__getitem__(block)
        if keys[-1] <= queries[0] and keys[0] > queries[-1] - self.window:
            return np.ones((len(queries), len(keys)), bool)
        if keys[0] > queries[-1] or keys[-1] <= queries[0] - self.window:
            return np.zeros((len(queries), len(keys)), bool)
        return super().__getitem__(block)


def _with_sinks(near: Callable[..., Any], sinks: int, query: Any, key: Any) -> Any:
    """Return which keys queries see, within the kernel or outside of it."""
    return near(query, key) | ((key < sinks) & (key <= query))

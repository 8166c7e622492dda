"""The contract of a sequence mixer, which `tests/test_contracts.py` holds each of `MIXERS` to."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from flax import nnx

from based_jax.dims import BD, BP, BPD, BT, BTD
from based_jax.nn.layers import Init

Buffer = str | np.ndarray | tuple[int, ...]
"""The key of the parameter that it repeats, its values where it is constant, or its shape where nothing reads it."""


class Operation(NamedTuple):
    """What a family of mixers shares its passes for: an operation on whole sequences, and on one token."""

    sequence: Callable[..., Any]
    step: Callable[..., Any]


class Mixer(nnx.Module):
    """What a mixer is; a cache is any pytree with leading batch axes.

    `state_size` counts elements per sequence in the paper's accounting, `flops_per_token` the forward pass.

    Where a publication's weights can be read, `REFERENCE` says for each publication under which state_dict key a
    parameter stands there, the output projection, whose rows are D, first; a tuple of keys is concatenated. `convert`
    turns layouts: a linear kernel is transposed, a parameter named *conv_kernel goes from [C, 1, W] to (W, C), axes of
    size 1 come and go, the rest is as it is. What a publication stores beside the parameters is in `reference_buffers`,
    and options that it takes where ours have other defaults are in `REFERENCE_OPTIONS`.
    """

    Config: ClassVar[Any]
    IMPLEMENTATIONS: ClassVar[Any] = {}  # the table of the operation that the option `impl` chooses from
    REFERENCE: ClassVar[Mapping[str, Mapping[str, str | tuple[str, ...]]]] = {}

    REFERENCE_OPTIONS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abc.abstractmethod
    def __init__(self, d_model: int, config: Any, init: Init): ...

    @abc.abstractmethod
    def __call__(self, x: BTD, segment_ids: BT | None = None, positions: BP | None = None) -> BPD:
        """Mix a whole sequence; with `positions` return the outputs there alone, in their order.

        What follows the operation on the sequence is computed for these tokens alone.
        """

    @abc.abstractmethod
    def init_cache(self, batch: int, max_len: int) -> Any:
        """Return the cache before the first token of sequences of up to `max_len` tokens.

        The length only matters to a cache that grows with it.
        """

    @abc.abstractmethod
    def prefill(self, x: BTD, cache: Any, segment_ids: BT | None = None) -> tuple[BTD, Any]:
        """Mix the next tokens of a sequence and return the cache after them."""

    @abc.abstractmethod
    def step(self, x: BD, cache: Any) -> tuple[BD, Any]:
        """Mix one token and return the cache after it."""

    def reference_buffers(self) -> Mapping[str, Buffer]:
        """Return what a publication may store beside the parameters, by its key there."""
        return {}

    @abc.abstractmethod
    def state_size(self, seq_len: int) -> int:
        """Return the elements of decode state after `seq_len` tokens."""

    def published_state_size(self, seq_len: int) -> int:
        """Return the elements that publications count (`nn/accounting.py`): those of the cache, unless overridden."""
        return self.state_size(seq_len)

    @abc.abstractmethod
    def flops_per_token(self, seq_len: int) -> int:
        """Return the mean forward FLOPs of one token of a sequence of `seq_len`."""

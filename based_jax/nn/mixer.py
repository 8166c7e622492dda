"""The contract of a sequence mixer, which `tests/test_contracts.py` holds each of `MIXERS` to."""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from based_jax.dims import BD, BP, BPD, BTD, SegmentIds, Unbroken
from based_jax.errors import UserError
from based_jax.nn.cache import Cache
from based_jax.nn.layers import LARGEST_SIZE, Init
from based_jax.nn.projections import Projected
from based_jax.ops import segments
from based_jax.ops.arguments import checked
from based_jax.ops.decode_calls import Pieces
from based_jax.ops.dispatch import Implementation, beside

Buffer = str | np.ndarray | tuple[int, ...]
"""The key of the parameter that it repeats, its values where it is constant, or its shape where nothing reads it."""


class Operation(NamedTuple):
    """What a family of mixers shares its passes for: an operation on whole sequences, and on one token.

    Attributes:
      steps: the table of the latter's implementations, if it has one.
    """

    sequence: Callable[..., Any]
    step: Callable[..., Any]
    steps: Mapping[str, Implementation] | None = None

    def step_options(self, impl: str) -> dict[str, str]:
        """Return what a mixer whose option `impl` is this one calls the step with."""
        return {} if self.steps is None else {"impl": beside(impl, self.steps)}


class Replay(NamedTuple):
    """Tokens that were read on trial: their inputs (B, T, D), and the state before them, out of which nothing went."""

    x: BTD
    state: Any


class Trial(NamedTuple):
    """What a mixer has of tokens that were read on trial, and the cache's id of each row's document."""

    tokens: Any
    segment_id: Int[Array, "B"]


class Mixer(nnx.Module):
    """What a mixer is: an operation on a whole sequence, and on its next tokens with a cache of those before.

    `segment_ids` are those of `ops/segments.py`: padding, id 0, is inert wherever it stands, and its output means
    nothing; documents do not see each other. Operations take them as they are; a model's are `dims.Unbroken`, of which
    `segments.ids_of` returns the array. A cache belongs to each row's last document. A prefill continues it where
    its first token has the same id, or where either of them has had none; else it begins a document, as if alone.

    A cache that grows with the sequence has room for `max_len` tokens of a document. A prefill of more is refused;
    where their number is known to the running program only (steps; ids, which may be padding), outputs of tokens beyond
    are NaN, and those of all others right.

    A subclass gives `__call__`, `_initial_state`, `_prefill`, `_step`, `state_size` and `flops_per_token`; its state is
    any pytree of arrays with leading batch axes.

    `state_size` counts elements per sequence in the paper's accounting, `flops_per_token` the forward pass.

    Where a publication's weights can be read, `REFERENCE` says for each publication under which state_dict key a
    parameter stands there, the output projection, whose rows are D, first; a tuple of keys is concatenated. `convert`
    turns layouts: a linear kernel is transposed, a parameter named *conv_kernel goes from [C, 1, W] to (W, C), axes of
    size 1 come and go, the rest is as it is. What a publication stores beside the parameters is in `reference_buffers`,
    and options that it takes where ours have other defaults are in `REFERENCE_OPTIONS`.
    """

    config: Any
    Config: ClassVar[Any]
    IMPLEMENTATIONS: ClassVar[Any] = {}  # the table of the operation that the option `impl` chooses from
    REFERENCE: ClassVar[Mapping[str, Mapping[str, str | tuple[str, ...]]]] = {}

    REFERENCE_OPTIONS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abc.abstractmethod
    def __init__(self, d_model: int, config: Any, init: Init): ...

    @abc.abstractmethod
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        """Mix a whole sequence; with `positions` return the outputs there alone, in their order.

        What follows the operation on the sequence is computed for these tokens alone.
        """

    @property
    def max_len(self) -> int | None:
        """The most tokens that a document may have, or None."""
        return None

    @property
    def prefix_length(self) -> int:
        """The tokens at the beginning of a document that have to come in one prefill."""
        return 0

    @property
    def rows_are_apart(self) -> bool:
        """Whether a prefill takes no other way for a row because of what others of its batch have read."""
        return True

    @property
    def head_counts(self) -> dict[str, int]:
        """The heads that a device of the mesh axis "tensor" has its share of, by what the options call them."""
        names = ("num_heads", "num_kv_heads")
        found = {name: getattr(self, name, None) or getattr(self.config, name, None) for name in names}
        return {name: count for name, count in found.items() if count is not None}

    @checked
    def init_cache(self, batch: int, max_len: int) -> Cache:
        """Return the cache before the first token of sequences of up to `max_len` tokens.

        The length only matters to a cache that grows with it.

        Raises:
          UserError: a number is none, or below 1, or the length is above the mixer's own `max_len`.
        """
        for name, count in (("batch", batch), ("max_len", max_len)):
            if count < 1:
                raise UserError(f"{name} of a cache is {count}; it is at least 1.")
        return Cache(self._initial_state(batch, max_len), jnp.zeros(batch, jnp.int32))

    def prefill(self, x: BTD, cache: Cache, segment_ids: SegmentIds | None = None) -> tuple[BTD, Cache]:
        """Mix the next tokens of a sequence and return the cache after them.

        Raises:
          UserError: there are more tokens than the cache has room for.
        """
        if segment_ids is None:
            y, state = self._prefill(x, cache.state, None)
            return y, cache._replace(state=state)
        # a cache keeps ids in 32 bits, and those of 64 are compared as they are kept
        first, last = (end(segment_ids).astype(jnp.int32) for end in (segments.first_id, segments.last_id))
        begins = (first != 0) & (cache.segment_id != 0) & (first != cache.segment_id)
        y, state = self._prefill(x, self._emptied(cache.state, begins), segment_ids)
        return y, Cache(state, jnp.where(last == 0, cache.segment_id, last))

    def step(self, x: BD, cache: Cache) -> tuple[BD | Projected, Cache]:
        """Mix one token and return what the stream adds, which may be left for it to compute, and the cache after."""
        y, state = self._step(x, cache.state)
        return y, cache._replace(state=state)

    def try_tokens(self, x: BTD, cache: Cache) -> tuple[BTD, Trial]:
        """Mix the next few tokens on trial: `keep` takes as many of them into the cache as turn out to stay.

        There is no padding among them. Raises as `prefill`.
        """
        y, tokens = self._try_tokens(x, cache.state)
        return y, Trial(tokens, cache.segment_id)

    def keep(self, trial: Trial, counts: Int[Array, "B"]) -> Cache:
        """Return the cache after the first `counts` tokens of each row of a trial, none where it is 0."""
        return Cache(self._keep(trial.tokens, counts), trial.segment_id)

    def step_whole(self, r: BD, y: Pieces | None, norm: Any, cache: Cache) -> tuple[BD, Pieces, Cache] | None:
        """Mix the norm of r + y of one sequence's token, where the mixer has one operation for that; else return None.

        Returns r + y, what is to be added next, and the cache after the token.
        """
        return None

    @abc.abstractmethod
    def _initial_state(self, batch: int, max_len: int) -> Any:
        """Return the state before the first token."""

    @abc.abstractmethod
    def _prefill(self, x: BTD, state: Any, segment_ids: SegmentIds | None) -> tuple[BTD, Any]:
        """Mix tokens, the first document of which continues the state's, and return the state of the last one."""

    @abc.abstractmethod
    def _step(self, x: BD, state: Any) -> tuple[BD | Projected, Any]:
        """Mix one token and return the state after it."""

    def _try_tokens(self, x: BTD, state: Any) -> tuple[BTD, Any]:
        """Mix tokens on trial, and return what `_keep` needs of them.

        A state that cannot be taken back is left as it is, and the tokens that stay are read again: by then what they
        are projected to is there, since a program computes equal things once.
        """
        y, _ = self._prefill(x, state, None)
        return y, Replay(x, state)

    def _keep(self, tokens: Any, counts: Int[Array, "B"]) -> Any:
        """Return the state after the first tokens of each row of a trial."""
        x, state = tokens
        kept = jnp.arange(x.shape[1])[None] < counts[:, None]
        return self._prefill(x, state, Unbroken(kept.astype(jnp.int32)))[1]

    def _emptied(self, state: Any, rows: Bool[Array, "B"]) -> Any:
        """Return the state with that before the first token in some rows."""

        def choose(empty, old):
            return jnp.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), empty, old)

        return jax.tree.map(choose, self._initial_state(rows.shape[0], 1), state)

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


def check_sizes(config: Any, *, most: int = LARGEST_SIZE, **least: int) -> None:
    """Raise UserError for a size of a mixer's config that is below its least value, or above `most`."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if not value >= smallest:
            raise UserError(f"{name} is {value}; it is at least {smallest}.")
        if value > most:
            raise UserError(f"{name} is {value}; it is at most {most}.")


def check_positive(config: Any, *names: str) -> None:
    """Raise UserError for a number of a mixer's config that is not above 0, or not finite."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value}; it is above 0.")

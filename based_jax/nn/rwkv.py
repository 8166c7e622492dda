"""What RWKV's mixers share: a state of memory and last token, the three ways through time, and small parts.

A time mixer gives `_project(x, previous)`, which returns what its operation takes and what its output needs besides,
`_options()` of the operation, and `_out`; x may hold one token or many.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from based_jax.dims import BD, BP, BPD, BTD, SegmentIds
from based_jax.nn import layers, multihead, projections
from based_jax.nn.mixer import Mixer, Operation
from based_jax.ops.token_shift import token_shift


class RwkvState(NamedTuple):
    """The operation's memory, and the last token."""

    memory: Any
    shift: BD


class TimeMix(Mixer):
    """Token shift, an operation with a state, and an output."""

    operation: ClassVar[Operation]
    config: Any
    d_model: int
    dtype: Any

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        previous, _ = token_shift(x, segment_ids=segment_ids)
        inputs, rest = self._project(x, previous)
        o, _ = self.operation.sequence(*inputs, **self._options(), segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, o, *rest))

    @override
    def _initial_state(self, batch: int, max_len: int) -> RwkvState:
        return RwkvState(self._initial_memory(batch), jnp.zeros((batch, self.d_model), self.dtype))

    @override
    def _prefill(self, x: BTD, state: RwkvState, segment_ids: SegmentIds | None) -> tuple[BTD, RwkvState]:
        previous, shift = token_shift(x, state=state.shift, segment_ids=segment_ids)
        inputs, rest = self._project(x, previous)
        o, memory = self.operation.sequence(
            *inputs, **self._options(), state=state.memory, segment_ids=segment_ids, impl=self.config.impl
        )
        return self._out(o, *rest), RwkvState(memory, shift)

    @override
    def _step(self, x: BD, state: RwkvState) -> tuple[BD | projections.Projected, RwkvState]:
        inputs, rest = self._project(x, state.shift.astype(x.dtype))
        options = self._options() | self.operation.step_options(self.config.impl)
        o, memory = self.operation.step(*inputs, state=state.memory, **options)
        return self._out(o, *rest), RwkvState(memory, x.astype(self.dtype))

    @abc.abstractmethod
    def _initial_memory(self, batch: int) -> Any: ...

    def _options(self) -> dict[str, Any]:
        return {}

    @abc.abstractmethod
    def _project(self, x, previous) -> tuple[tuple, tuple]: ...

    @abc.abstractmethod
    def _out(self, o, *rest): ...


class ChannelMix(Mixer):
    """A feed-forward layer that sees the token before: its whole cache is that token."""

    d_model: int
    dtype: Any

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        previous, _ = token_shift(x, segment_ids=segment_ids)
        return self._mix(*layers.at(positions, x, previous))

    @override
    def _initial_state(self, batch: int, max_len: int) -> BD:
        return jnp.zeros((batch, self.d_model), self.dtype)

    @override
    def _prefill(self, x: BTD, state: BD, segment_ids: SegmentIds | None) -> tuple[BTD, BD]:
        previous, last = token_shift(x, state=state, segment_ids=segment_ids)
        return self._mix(x, previous), last

    @override
    def _step(self, x: BD, state: BD) -> tuple[BD | projections.Projected, BD]:
        return self._mix(x, state.astype(x.dtype)), x.astype(self.dtype)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return the D elements of a token; equal to the cache's."""
        return self.d_model

    @abc.abstractmethod
    def _mix(self, x, previous): ...


class HeadNorm(nnx.Module):
    """LayerNorm of each head with a scale and a bias of their own for every channel.

    This is a group norm of every token; `nnx.GroupNorm` takes its statistics over the tokens of a sequence as well.
    """

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width), **layers.logical_axes("heads"))
        self.bias = nnx.Param(jnp.zeros(width), **layers.logical_axes("heads"))

    def __call__(self, o: Float[Array, "*T H V"]) -> Float[Array, "*T D"]:
        """Normalise and join the heads, in fp32."""
        o = o.astype(jnp.float32)
        variance = jnp.var(o, axis=-1, keepdims=True)  # the difference of means that JAX takes by default cancels
        o = multihead.merge_heads(jax.nn.standardize(o, axis=-1, variance=variance, epsilon=self.epsilon))
        return o * layers.per_channel(self.scale[...], o) + layers.per_channel(self.bias[...], o)


class LoRA(nnx.Module):
    """up(activation(down(x))): a projection of low rank, in fp32."""

    def __init__(self, d_in: int, rank: int, d_out: int, activation: Callable, init: layers.Init, *, bias: bool):
        self.activation = activation
        self.down = layers.linear(d_in, rank, ("embed", None), init.fp32)
        self.up = layers.linear(rank, d_out, (None, "heads"), init.fp32, bias=bias)

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T _"]:
        """Apply to each token."""
        return self.up(self.activation(self.down(x)))


def mix_parameter(count: int, d_model: int, value: float = 0.5) -> nnx.Param:
    """Return (count, D) shares of a token and the one before."""
    return nnx.Param(jnp.full((count, d_model), value), **layers.logical_axes(None, "embed"))


def mixed(x: Float[Array, "*T D"], previous: Float[Array, "*T D"], shares: Float[Array, "_ D"]) -> list[Array]:
    """Return share x + (1 - share) previous for each row of shares."""
    weights = [layers.per_channel(share, x) for share in shares]
    return [x * weight + previous * (1 - weight) for weight in weights]

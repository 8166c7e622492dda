"""What RWKV's mixers share: a cache of state and last token, the three ways through time, and small parts.

A time mixer gives `_project(x, previous)`, which returns what its operation takes and what its output needs besides,
`_options()` of the operation, and `_out`; x may hold one token or many.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from based_jax.dims import BD, BP, BPD, BT, BTD
from based_jax.nn import layers
from based_jax.ops.token_shift import token_shift


class RwkvCache(NamedTuple):
    """The operation's state, and the last token."""

    state: Any
    shift: BD


class TimeMix(nnx.Module):
    """Token shift, an operation with a state, and an output."""

    IMPLEMENTATIONS: ClassVar[Any] = {}
    operation: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]
    config: Any
    d_model: int
    dtype: Any

    def __call__(self, x: BTD, segment_ids: BT | None = None, positions: BP | None = None) -> BPD:
        """Mix a whole sequence."""
        inputs, rest = self._project(x, self._shifted(x, segment_ids))
        o = self.operation[0](*inputs, **self._options(), segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, o, *rest))

    def init_cache(self, batch: int, max_len: int) -> RwkvCache:
        """Return the cache before the first token; its size does not depend on `max_len`."""
        return RwkvCache(self._initial_state(batch), jnp.zeros((batch, self.d_model), self.dtype))

    def prefill(self, x: BTD, cache: RwkvCache, segment_ids: BT | None = None) -> tuple[BTD, RwkvCache]:
        """Mix the next tokens of a sequence and return the cache after them."""
        previous, shift = token_shift(x, state=cache.shift, segment_ids=segment_ids, return_state=True)
        inputs, rest = self._project(x, previous)
        o, state = self.operation[0](
            *inputs,
            **self._options(),
            state=cache.state,
            segment_ids=segment_ids,
            return_state=True,
            impl=self.config.impl,
        )
        return self._out(o, *rest), RwkvCache(state, shift)

    def step(self, x: BD, cache: RwkvCache) -> tuple[BD, RwkvCache]:
        """Mix one token and return the cache after it."""
        inputs, rest = self._project(x, cache.shift.astype(x.dtype))
        o, state = self.operation[1](*inputs, state=cache.state, **self._options())
        return self._out(o, *rest), RwkvCache(state, x.astype(self.dtype))

    def _shifted(self, x, segment_ids):
        return token_shift(x, segment_ids=segment_ids)

    def _initial_state(self, batch: int) -> Any:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {}

    def _project(self, x, previous) -> tuple[tuple, tuple]:
        raise NotImplementedError

    def _out(self, o, *rest):
        raise NotImplementedError


class ChannelMix(nnx.Module):
    """A feed-forward layer that sees the token before: its whole cache is that token."""

    IMPLEMENTATIONS: ClassVar[Any] = {}
    d_model: int
    dtype: Any

    def __call__(self, x: BTD, segment_ids: BT | None = None, positions: BP | None = None) -> BPD:
        """Mix a whole sequence."""
        return self._mix(*layers.at(positions, x, token_shift(x, segment_ids=segment_ids)))

    def init_cache(self, batch: int, max_len: int) -> BD:
        """Return the token before the first one."""
        return jnp.zeros((batch, self.d_model), self.dtype)

    def prefill(self, x: BTD, cache: BD, segment_ids: BT | None = None) -> tuple[BTD, BD]:
        """Mix the next tokens of a sequence and return the last of them."""
        previous, cache = token_shift(x, state=cache, segment_ids=segment_ids, return_state=True)
        return self._mix(x, previous), cache

    def step(self, x: BD, cache: BD) -> tuple[BD, BD]:
        """Mix one token and return it."""
        return self._mix(x, cache.astype(x.dtype)), x.astype(self.dtype)

    def state_size(self, seq_len: int) -> int:
        """Return the D elements of a token; equal to the cache's."""
        return self.d_model

    def _mix(self, x, previous):
        raise NotImplementedError


class HeadNorm(nnx.Module):
    """LayerNorm of each head with a scale and a bias of their own for every channel (group norm)."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width), **layers.named("heads"))
        self.bias = nnx.Param(jnp.zeros(width), **layers.named("heads"))

    def __call__(self, o: Float[Array, "*T H V"]) -> Float[Array, "*T D"]:
        """Normalise and join the heads, in fp32."""
        o = o.astype(jnp.float32)
        o = o - o.mean(axis=-1, keepdims=True)
        o = layers.merge_heads(o / jnp.sqrt((o * o).mean(axis=-1, keepdims=True) + self.eps))
        return o * per_channel(self.scale[...], o) + per_channel(self.bias[...], o)


class LoRA(nnx.Module):
    """up(activation(down(x))): a projection of low rank, in fp32."""

    def __init__(
        self, d_in: int, rank: int, d_out: int, activation: Callable, *, bias: bool, std: float, rngs: nnx.Rngs
    ):
        self.activation = activation
        options: dict[str, Any] = {"std": std, "dtype": jnp.float32, "rngs": rngs}
        self.down = layers.linear(d_in, rank, ("embed", None), **options)
        self.up = layers.linear(rank, d_out, (None, "heads"), bias=bias, **options)

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T _"]:
        """Apply to each token."""
        return self.up(self.activation(self.down(x)))


def per_channel(parameter: Float[Array, "D"], x: Array) -> Array:
    """Return a parameter over channels with axes of size 1 for the others of x, in its dtype."""
    return parameter.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def mix_parameter(count: int, d_model: int, value: float = 0.5) -> nnx.Param:
    """Return (count, D) shares of the token before."""
    return nnx.Param(jnp.full((count, d_model), value), **layers.named(None, "embed"))

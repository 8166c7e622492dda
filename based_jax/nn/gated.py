"""What mixers with a decaying (K, V) state share: projections, caches, and the three ways through time.

A mixer gives its sizes and `_gated(x, q, k, v)`, which returns what its operation takes (q, k, v, log_decay, ...) by
head; x may hold one token or many.
"""

import abc
import math
from typing import Any, ClassVar, NamedTuple, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from based_jax.dims import BD, BHV, BP, BPD, BTD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn import layers, multihead, projections
from based_jax.nn.mixer import Mixer, Operation
from based_jax.ops import sequence
from based_jax.ops.conv import short_conv, short_conv_step
from based_jax.ops.decays import initial_state
from based_jax.ops.gated_linear_attention import (
    IMPLEMENTATIONS,
    gated_linear_attention,
    gated_linear_attention_step,
)
from based_jax.ops.matrix_state_step import IMPLEMENTATIONS as MATRIX_STATE_STEPS

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class GatedState(NamedTuple):
    """The operation's memory, the inputs of the short convolution, and the tokens that the document has had."""

    memory: Any
    conv: Float[Array, "B W channels"]
    length: Int[Array, "B"]


def expanded(name: str, d_model: int, factor: float, num_heads: int) -> int:
    """Return d_model * factor, which the heads have to divide.

    Raises:
      UserError: they do not, or the width is impossible.
    """
    width = layers.scaled(name, d_model, factor)
    if width % num_heads:
        raise UserError(f"{name} {factor} of d_model {d_model} cannot be divided into {num_heads} heads.")
    return width


class ProjectedHeads(NamedTuple):
    """Heads of queries, keys and values that are projected; each serves as many of the operation's as are left.

    Source: grouped keys and values, arXiv 2305.13245; grouped queries and keys, fla/layers/gated_deltanet.py.
    """

    queries: int
    keys: int
    values: int

    @classmethod
    def grouped_keys(cls, num_heads: int, num_kv_heads: int | None) -> "ProjectedHeads":
        """Return heads of which several queries share a key and a value; None for as many as queries."""
        shared = num_heads if num_kv_heads is None else num_kv_heads
        return cls(num_heads, shared, shared)

    @classmethod
    def grouped_values(cls, num_heads: int, num_v_heads: int | None) -> "ProjectedHeads":
        """Return heads of which several values share a query and a key; None for as many as queries."""
        return cls(num_heads, num_heads, num_heads if num_v_heads is None else num_v_heads)


class GatedLinearMixer(Mixer):
    """Projections to queries, keys and values, an optional short convolution, a decaying state, a norm and a gate.

    Attributes:
      operation: what makes the output from what `_gated` returns.
      conv_silu: whether SiLU follows the short convolution.
      silu_without_conv: whether it follows the projections where there is no convolution.
      rotary: whether queries and keys turn with their place.
      scale: of the output; 1 / sqrt(K) where None.
      gate_activation: of the gate on the output; None for no gate.
      norm_over_heads: whether the RMSNorm of the output is one over all heads, rather than one for each.
    """

    IMPLEMENTATIONS: ClassVar = IMPLEMENTATIONS
    operation: ClassVar[Operation] = Operation(gated_linear_attention, gated_linear_attention_step, MATRIX_STATE_STEPS)
    conv_silu: ClassVar[bool] = True
    silu_without_conv: ClassVar[bool] = False
    rotary: ClassVar[bool] = False
    scale: ClassVar[float | None] = None
    gate_activation: ClassVar[Any] = staticmethod(jax.nn.silu)
    norm_over_heads: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        config: Any,
        init: layers.Init,
        *,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        conv_size: int = 0,
        gate_rank: int = 0,
        use_gate: bool = True,
        projected: ProjectedHeads | None = None,
    ):
        """Make the projections, the taps, the norm and the gate.

        Args:
          d_model, config, init: as of `Mixer`.
          num_heads: H.
          key_dim, value_dim: widths of all heads together.
          conv_size: taps of the convolution over queries, keys and values; 0 for none.
          gate_rank: of the gate's projection, with a bias; 0 for a full one.
          use_gate: whether there is a gate, if the class has an activation for it.
          projected: the heads that are projected, each a share of H; None for H of all three.
        """
        self.config, self.d_model, self.dtype = config, d_model, init.dtype
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.conv_size, self.gate_rank = conv_size, gate_rank
        if self.rotary:
            multihead.rotary_dim(key_dim // num_heads, 1.0)
        self.has_gate = use_gate and self.gate_activation is not None
        self.projected = projected or ProjectedHeads(num_heads, num_heads, num_heads)
        self.widths = self._projected_widths()
        self.qkv = layers.linear(d_model, sum(self.widths), ("embed", "heads"), init, parts=self.widths)
        if conv_size:
            self.conv_kernel = layers.conv_parameter((conv_size, sum(self.widths)), conv_size, rngs=init.rngs)
        if self.has_gate and gate_rank == 0:
            self.gate = layers.linear(d_model, value_dim, ("embed", "heads"), init)
        if self.has_gate and gate_rank:
            self.gate_down = layers.linear(d_model, gate_rank, ("embed", None), init)
            self.gate_up = layers.linear(gate_rank, value_dim, (None, "heads"), init, bias=True)
        norm_width = value_dim if self.norm_over_heads else value_dim // num_heads
        self.norm = layers.rms_norm(norm_width, init.norm_eps, rngs=init.rngs)
        self.out_proj = layers.linear(value_dim, d_model, ("heads", "embed"), init.out)

    @override
    def __call__(self, x: BTD, segment_ids: SegmentIds | None = None, positions: BP | None = None) -> BPD:
        y, _ = self._convolved(self.qkv(x), None, segment_ids)
        inputs, _ = self._inputs(x, y, jnp.zeros(1, jnp.int32), segment_ids)
        o, _ = self.operation.sequence(*inputs, scale=self.scale, segment_ids=segment_ids, impl=self.config.impl)
        return self._out(*layers.at(positions, x, o))

    @override
    def _initial_state(self, batch: int, max_len: int) -> GatedState:
        H = self.num_heads
        conv = jnp.zeros((batch, self.conv_size, sum(self.widths)), self.dtype)
        memory = initial_state(batch, H, self.key_dim // H, self.value_dim // H)
        return GatedState(memory, conv, jnp.zeros(batch, jnp.int32))

    @override
    def _prefill(self, x: BTD, state: GatedState, segment_ids: SegmentIds | None) -> tuple[BTD, GatedState]:
        y, conv = self._convolved(self.qkv(x), state.conv, segment_ids)
        inputs, length = self._inputs(x, y, state.length, segment_ids)
        o, memory = self.operation.sequence(
            *inputs,
            scale=self.scale,
            state=state.memory,
            segment_ids=segment_ids,
            impl=self.config.impl,
        )
        return self._out(x, o), GatedState(memory, conv, length)

    @override
    def _step(self, x: BD, state: GatedState) -> tuple[BD | projections.Projected, GatedState]:
        (y, *gate), conv = self._projections(x), state.conv
        if self.conv_size:
            y, conv = short_conv_step(y, self.conv_kernel[...], conv, silu=self.conv_silu)
        elif self.silu_without_conv:
            y = jax.nn.silu(y)
        o, memory = self._step_state(x, y, state)
        return self._out(x, o, *gate), GatedState(memory, conv, state.length + 1)

    def _step_state(self, x: BD, y: Float[Array, "B joint"], state: GatedState) -> tuple[BHV, Any]:
        """Return what a step's tokens read of their states, and those after them; y is queries, keys and values."""
        q, k, v = self._heads(y)
        if self.rotary:
            q, k = (multihead.rotary(z[:, None], state.length[:, None], z.shape[-1], 10000.0)[:, 0] for z in (q, k))
        options = self.operation.step_options(self.config.impl)
        return self.operation.step(*self._gated(x, q, k, v), state.memory, scale=self.scale, **options)

    @override
    def state_size(self, seq_len: int) -> int:
        """Return K V elements a head, and the inputs of the short convolution; equal to the cache's."""
        return self.key_dim * self.value_dim // self.num_heads + self.conv_size * sum(self.widths)

    @override
    def published_state_size(self, seq_len: int) -> int:
        """Return K V elements a head, as publications count: without the inputs of the short convolution."""
        return self.key_dim * self.value_dim // self.num_heads

    @override
    def flops_per_token(self, seq_len: int) -> int:
        """Return forward FLOPs: the projections, the taps, and writing and reading the state once."""
        qkv = sum(self.widths)
        gate = self.d_model * self.value_dim if self.has_gate else 0
        if self.gate_rank:
            gate = self.gate_rank * (self.d_model + self.value_dim)
        weights = self.d_model * (qkv + self.value_dim) + self.conv_size * qkv + gate + self._gate_weights()
        return 2 * weights + 4 * self.key_dim * self.value_dim // self.num_heads

    def _gate_weights(self) -> int:
        """Return the weights of the decay's and rate's projections."""
        return 0

    def _gate(self, x):
        return self.gate_up(self.gate_down(x)) if self.gate_rank else self.gate(x)

    @abc.abstractmethod
    def _gated(self, x, q, k, v) -> tuple[Array, ...]:
        """Return what the operation takes, by head."""

    def _projected_widths(self) -> tuple[int, int, int]:
        key, value = self.key_dim // self.num_heads, self.value_dim // self.num_heads
        queries, keys, values = self.projected
        return queries * key, keys * key, values * value

    def _convolved(self, y, conv, segment_ids):
        """Return the projections behind the taps, if there are any, and the inputs of these for the next tokens."""
        if self.conv_size:
            options = {"silu": self.conv_silu, "state": conv, "segment_ids": segment_ids}
            return short_conv(y, self.conv_kernel[...], **options)
        return jax.nn.silu(y) if self.silu_without_conv else y, conv

    def _heads(self, y):
        """Return queries, keys and values by head of the operation."""
        queries, keys, _ = self.widths
        parts = jnp.split(y, [queries, queries + keys], axis=-1)
        heads = (multihead.split_heads(part, count) for part, count in zip(parts, self.projected, strict=True))
        return tuple(self._for_all_heads(part) for part in heads)

    def _for_all_heads(self, part):
        """Return heads (..., count, .) repeated for those of the operation that each of them serves."""
        repeats = self.num_heads // part.shape[-2]
        return part if repeats == 1 else jnp.repeat(part, repeats, axis=-2)

    def _inputs(self, x, y, length, segment_ids):
        q, k, v = self._heads(y)
        places, length = sequence.positions(segment_ids, length, x.shape[1])
        if self.rotary:
            q, k = (multihead.rotary(z, places, z.shape[-1], 10000.0) for z in (q, k))
        return self._gated(x, q, k, v), length

    def _projections(self, x: BD) -> list[Array]:
        """Return queries, keys and values of a step's tokens, and their gate where it is of the same kind."""
        return projections.several([self.qkv, *([self.gate] if self.has_gate and not self.gate_rank else [])], x)

    def _out(self, x, o, gate=None):
        o = self.norm(multihead.merge_heads(o)) if self.norm_over_heads else multihead.merge_heads(self.norm(o))
        if self.has_gate:
            gate = self._gate(x) if gate is None else gate
            o = o * self.gate_activation(gate.astype(jnp.float32))
        return projections.into_stream(self.out_proj, o.astype(self.dtype))


def constant_decay(x: Float[Array, "*T D"], log_decay: Float[Array, "H"]) -> Float[Array, "*T H 1"]:
    """Return each head's log-decay for every token of x."""
    return jnp.broadcast_to(log_decay[:, None], (*x.shape[:-1], log_decay.size, 1))


def head_slopes(num_heads: int) -> list[float]:
    """Return the slopes 2^(-8 h / H) of ALiBi, h from 1, as lightning attention takes them (powers of two first)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    between = [2 ** (-4 * (2 * h + 1) / power) for h in range(num_heads - power)]
    return slopes + between


def check_kv_heads(config: Any) -> None:
    """Raise UserError for keys and values that cannot serve equally many of a config's queries."""
    shared, num_heads = config.num_kv_heads, config.num_heads
    if shared is not None and (shared < 1 or num_heads % shared):
        raise UserError(f"num_kv_heads is {shared}; it divides num_heads, which is {num_heads}.")


def check_v_heads(config: Any) -> None:
    """Raise UserError for values that cannot share a config's queries and keys equally."""
    values, num_heads = config.num_v_heads, config.num_heads
    if values is not None and (not num_heads <= values <= layers.LARGEST_SIZE or values % num_heads):
        raise UserError(f"num_v_heads is {values}; it is a multiple of num_heads, which is {num_heads}.")


def delta_rate(logits: Float[Array, "*T H"], allow_neg_eigval: bool) -> Float[Array, "*T H"]:
    """Return beta = sigmoid(logits) of the delta rule, or its double, with which a state's directions can flip."""
    return jax.nn.sigmoid(logits) * (2.0 if allow_neg_eigval else 1.0)


def softplus_decay(logits: Float[Array, "*T _"], A_log: Float[Array, "_"], dt_bias: Float[Array, "_"]) -> Array:
    """Return -exp(A_log) softplus(logits + dt_bias), the log-decay of Mamba-2, Gated DeltaNet and KDA."""
    logits = logits.astype(jnp.float32)
    step = jax.nn.softplus(logits + layers.per_channel(dt_bias, logits))
    return -layers.per_channel(jnp.exp(A_log), logits) * step


def bounded_decay(
    logits: Float[Array, "*T _"], A_log: Float[Array, "_"], dt_bias: Float[Array, "_"], lower_bound: float
) -> Array:
    """Return lower_bound sigmoid(exp(A_log) (logits + dt_bias)), KDA's log-decay that never falls below the bound."""
    logits = logits.astype(jnp.float32)
    slope = layers.per_channel(jnp.exp(A_log), logits)
    return lower_bound * jax.nn.sigmoid(slope * (logits + layers.per_channel(dt_bias, logits)))


def log_uniform_dt(count: int, rngs: nnx.Rngs) -> Float[Array, "_"]:
    """Return logarithms of steps between 0.001 and 0.1, uniform (S4, Mamba)."""
    return jax.random.uniform(rngs.params(), (count,), minval=math.log(DT_MIN), maxval=math.log(DT_MAX))


def inverse_softplus_dt(count: int, rngs: nnx.Rngs) -> Float[Array, "_"]:
    """Return biases whose softplus is a step of `log_uniform_dt` (Mamba)."""
    dt = jnp.maximum(jnp.exp(log_uniform_dt(count, rngs)), DT_FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))

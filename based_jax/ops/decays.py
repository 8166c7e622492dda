"""What operations on matrix states with decays share: pairs of tokens weighed by the decay between them, by blocks.

In a chunk with log-decays until_t up to the state after each token, and seen_t up to the state that each token reads,
the pair t >= s decays by exp(seen_t - until_s). No exponent above 0 is ever taken: blocks of `BLOCK_TOKENS` tokens meet
through the decay at the beginning of the later one, and a block meets itself pair by pair.

Sums of a chunk's log-decays are as large as the strongest decay makes them, and their differences must not lose the
weak ones for it: they are kept in two parts (`LogDecays`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from based_jax import devices
from based_jax.dims import BHKV, BTHK
from based_jax.ops.calls import Decay, MatrixStateCall
from based_jax.ops.decode_calls import MatrixStepCall
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.precision import EXACT, einsum, narrow_einsum
from based_jax.ops.segments import FORGET_LOG_DECAY

BLOCK_TOKENS = 16
MIN_LOG_DECAY = -128.0
"""A log-decay that leaves nothing in fp32, as all do that are below it."""
FP32_DIGITS = 24


def finite(log_decay: Array) -> Array:
    """Return log-decays, or rates of decay, with a number for -inf, of which 0 times would be NaN and not none."""
    return jnp.maximum(log_decay, FORGET_LOG_DECAY)


class LogDecays(NamedTuple):
    """Log-decays from a chunk's beginning up to some states, such that differences are exact to fp32's last digit.

    Attributes:
      coarse: sums of each token's log-decay rounded to a grid, which are exact.
      fine: sums of what is left of each, which are small; gradients flow through them alone.
      tokens: how many tokens decay them, padding left out, with axes of size 1 for heads and channels.
    """

    coarse: Decay
    fine: Decay
    tokens: Int[Array, "#B T 1 1"]

    @classmethod
    def until(cls, log_decay: Decay, visible: Bool[Array, "#B T T"]) -> "LogDecays":
        """Return those up to the state after each token of a chunk, of which each but padding is visible to itself."""
        grid = 2.0 ** (math.ceil(math.log2(-MIN_LOG_DECAY * log_decay.shape[1])) - FP32_DIGITS)
        log_decay = jnp.maximum(log_decay, MIN_LOG_DECAY)
        coarse = jax.lax.stop_gradient(jnp.round(log_decay / grid) * grid)
        tokens = jnp.cumsum(jnp.diagonal(visible, axis1=1, axis2=2), axis=1)[..., None, None]
        return cls(jnp.cumsum(coarse, axis=1), jnp.cumsum(log_decay - coarse, axis=1), tokens)

    def before(self) -> "LogDecays":
        """Return those up to the state before each token."""
        return self.shaped(lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0))))

    def since(self, earlier: "LogDecays", mask: Bool[Array, "..."] | bool = True) -> Float[Array, "..."]:
        """Return the log-decay from earlier states to these, -inf where they are not under a mask.

        A state has none to itself, and no gradient of it: it would drown those of weaker pairs.
        """
        decay, same = (self.coarse - earlier.coarse) + (self.fine - earlier.fine), self.tokens == earlier.tokens
        return jnp.where(mask & ~same, decay, jnp.where(mask & same, 0.0, -jnp.inf))

    def kept(self) -> Decay:
        """Return what is left of the chunk's beginning in each state."""
        return jnp.exp(self.coarse + self.fine)

    def left(self) -> Decay:
        """Return what is left of each state at the chunk's end."""
        return jnp.exp(self.shaped(lambda x: x[:, -1:]).since(self))

    def shaped(self, shape: Callable[[Array], Array]) -> "LogDecays":
        """Return all of it in another shape."""
        return LogDecays(*map(shape, self))


def initial_state(batch: int, heads: int, key_dim: int, value_dim: int) -> BHKV:
    """Return the state before the first token."""
    return jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32)


def empty_state(call: MatrixStateCall) -> BHKV:
    """Return the state before the first token of a call."""
    batch, _, heads, values = call.v.shape
    return initial_state(batch, heads, call.q.shape[3], values)


def stepped(
    x: Float[Array, "*T H P"], dt: Float[Array, "*T H"], A: Float[Array, "H"]
) -> tuple[Float[Array, "*T H P"], Float[Array, "*T H 1"]]:
    """Return the values dt x, and the log-decays dt A, by which a state space with steps is linear attention."""
    dt = dt.astype(jnp.float32)[..., None]
    rates = A.astype(jnp.float32).reshape(*(1,) * (dt.ndim - 2), -1, 1)
    return (x.astype(jnp.float32) * dt).astype(x.dtype), rates * dt


def pair_weights(
    q: BTHK, k: BTHK, seen: LogDecays, until: LogDecays, visible, dtype, precision
) -> Float[Array, "B H T S"]:
    """Return sum_k q_tk k_sk exp(seen_tk - until_sk) of the visible pairs of a chunk, 0 elsewhere."""
    mask = visible[:, None]
    if seen.coarse.shape[-1] == 1:
        late, early = (x.shaped(lambda x: jnp.moveaxis(x[..., 0], 1, 2)) for x in (seen, until))
        late, early = late.shaped(lambda x: x[..., None]), early.shaped(lambda x: x[..., None, :])
        decay = jnp.exp(late.since(early, mask))
        return narrow_einsum("BTHK,BSHK->BHTS", q.astype(dtype), k.astype(dtype), precision) * decay

    T = q.shape[1]
    q, k, seen, until = jax.tree.map(_pad_blocks, (q, k, seen, until))
    near = _within_blocks(q, k, seen, until, _pad_pairs(visible))
    far = _between_blocks(q, k, seen, until, dtype, precision)
    return jnp.where(mask, far[:, :, :T, :T], 0.0) + near[:, :, :T, :T]


def weighted_sums(pairs: Float[Array, "B H T T"], x: BTHK, until: LogDecays) -> BTHK:
    """Return sum_s pairs_ts x_sk exp(until_tk - until_sk) of a chunk, in fp32; pairs that do not count are 0."""
    T, padding = x.shape[1], (0, -x.shape[1] % BLOCK_TOKENS)
    pairs = jnp.pad(pairs, [(0, 0), (0, 0), padding, padding])
    x, until = jax.tree.map(_pad_blocks, (x, until))

    since, earlier = _towards_blocks(x, until, until)
    rows = einops.rearrange(pairs, "B H (N C) S -> B H N C S", C=BLOCK_TOKENS)
    far = einsum("BHNCS,BNSHK->BNCHK", rows, earlier, EXACT) * since
    own = jnp.moveaxis(_pairs_of_blocks(pairs), 1, -1)[..., None]  # (B, N, C, C, H, 1)
    decay = _decays_of_blocks(until, until, jnp.tri(BLOCK_TOKENS, dtype=bool)[None, None])
    near = jnp.sum(own * decay * _blocks(x)[:, :, None], axis=3)
    return einops.rearrange(far + near, "B N C H K -> B (N C) H K")[:, :T]


def _between_blocks(q: BTHK, k: BTHK, seen: LogDecays, until: LogDecays, dtype, precision) -> Float[Array, "B H T S"]:
    """Weigh pairs of different blocks: both decay towards the beginning of the query's block."""
    since, keys = _towards_blocks(k, seen, until)
    queries = _blocks(q) * since
    weights = einsum("BNCHK,BNSHK->BHNCS", queries.astype(dtype), keys.astype(dtype), precision)
    return einops.rearrange(weights, "B H N C S -> B H (N C) S")


def _within_blocks(q: BTHK, k: BTHK, seen: LogDecays, until: LogDecays, visible) -> Float[Array, "B H T S"]:
    """Weigh pairs of the same block one by one, in fp32."""
    decay = _decays_of_blocks(seen, until, _pairs_of_blocks(visible[:, None])[:, 0])
    pairs = jnp.sum(_blocks(q)[:, :, :, None] * _blocks(k)[:, :, None] * decay, axis=-1)  # (B, N, C, C, H)
    same = jnp.eye(pairs.shape[1], dtype=pairs.dtype)[None, None, :, None, :, None]
    weights = einops.rearrange(pairs, "B N C S H -> B H N C 1 S") * same
    return einops.rearrange(weights, "B H N C M S -> B H (N C) (M S)")


def _towards_blocks(
    k: BTHK, seen: LogDecays, until: LogDecays
) -> tuple[Float[Array, "B N C H #K"], Float[Array, "B N S H K"]]:
    """Return what queries see of their block's beginning, and what is left there of keys before it, of others 0."""
    begin = until.before().shaped(lambda x: x[:, ::BLOCK_TOKENS, None])
    earlier = jnp.arange(k.shape[1])[None, :] < BLOCK_TOKENS * jnp.arange(begin.fine.shape[1])[:, None]
    left = begin.since(until.shaped(lambda x: x[:, None]), earlier[None, :, :, None, None])
    return jnp.exp(seen.shaped(_blocks).since(begin)), k[:, None] * jnp.exp(left)


def _decays_of_blocks(seen: LogDecays, until: LogDecays, mask: Bool[Array, "_ _ C C"]) -> Float[Array, "B N C C H _"]:
    """Return the decay of the pairs of each block, 0 where they do not count."""
    late = seen.shaped(lambda x: _blocks(x)[:, :, :, None])
    return jnp.exp(late.since(until.shaped(lambda x: _blocks(x)[:, :, None]), mask[..., None, None]))


def _pairs_of_blocks(x: Shaped[Array, "B H T S"]) -> Shaped[Array, "B H N C C"]:
    """Return the pairs of the same block."""
    blocks = einops.rearrange(x, "B H (N C) (M S) -> B H N C M S", C=BLOCK_TOKENS, S=BLOCK_TOKENS)
    return einops.rearrange(jnp.diagonal(blocks, axis1=2, axis2=4), "B H C S N -> B H N C S")


def _blocks(x: Shaped[Array, "B T H K"]) -> Shaped[Array, "B N C H K"]:
    """Cut time, filled up, into blocks."""
    return einops.rearrange(x, "B (N C) H K -> B N C H K", C=BLOCK_TOKENS)


def _pad_blocks(x: Array) -> Array:
    """Fill time up to whole blocks with copies of the last token."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % BLOCK_TOKENS), (0, 0), (0, 0)], mode="edge")


def _pad_pairs(visible):
    padding = (0, -visible.shape[1] % BLOCK_TOKENS)
    return jnp.pad(visible, [(0, 0), padding, padding])


def as_dplr[Call: (MatrixStateCall, MatrixStepCall)](call: Call) -> Call:
    """Return the call of the diagonal plus low rank form that equals one of the delta rule, of one token or of many."""
    assert call.beta is not None
    k, rate, log_decay = (x.astype(jnp.float32) for x in (call.k, call.beta[..., None], call.log_decay))
    written = (rate * k).astype(call.k.dtype)
    return call._replace(k=written, log_decay=log_decay, beta=None, a=jnp.exp(log_decay) * k, b=-rate * k)


def one_chunk_is_faster(time: int, most: int, state_elements: int) -> str | None:
    """Return why kernels are slower than one chunk in XLA of at most so many tokens, where heads have one decay."""
    if time <= most and state_elements >= devices.crossovers(target_device_kind()).large_state_elements:
        return f"one chunk is faster where heads have one decay, T is {time} and a state has {state_elements} elements"
    return None

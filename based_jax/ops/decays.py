"""What operations on matrix states with decays share: pairs of tokens weighed by the decay between them, by blocks.

In a chunk with log-decays until_t up to the state after each token, and seen_t up to the state that each token reads,
the pair t >= s decays by exp(seen_t - until_s). No exponent above 0 is ever taken: blocks of `BLOCK_TOKENS` tokens meet
through the decay at the beginning of the later one, and a block meets itself pair by pair.
"""

import einops
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from based_jax import devices
from based_jax.dims import BHKV, BTHK
from based_jax.ops.calls import Decay, MatrixStateCall
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.precision import EXACT, einsum, narrow_einsum

BLOCK_TOKENS = 16


def initial_state(batch: int, heads: int, key_dim: int, value_dim: int) -> BHKV:
    """Return the state before the first token."""
    return jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32)


def empty_state(call: MatrixStateCall) -> BHKV:
    """Return the state before the first token of a call."""
    batch, _, heads, key_dim = call.q.shape
    return initial_state(batch, heads, key_dim, call.v.shape[3])


def pair_weights(q: BTHK, k: BTHK, seen: Decay, until: Decay, visible, dtype, precision) -> Float[Array, "B H T S"]:
    """Return sum_k q_tk k_sk exp(seen_tk - until_sk) of the visible pairs of a chunk, 0 elsewhere."""
    mask = visible[:, None]
    if seen.shape[-1] == 1:
        difference = jnp.moveaxis(seen[..., 0], 1, 2)[..., :, None] - jnp.moveaxis(until[..., 0], 1, 2)[..., None, :]
        decay = jnp.exp(jnp.where(mask, difference, -jnp.inf))
        return narrow_einsum("BTHK,BSHK->BHTS", q.astype(dtype), k.astype(dtype), precision) * decay

    T = q.shape[1]
    q, k, seen, until = (_pad_blocks(x) for x in (q, k, seen, until))
    near = _within_blocks(q, k, seen, until, _pad_pairs(visible))
    far = _between_blocks(q, k, seen, until, dtype, precision)
    return jnp.where(mask, far[:, :, :T, :T], 0.0) + near[:, :, :T, :T]


def weighted_sums(pairs: Float[Array, "B H T T"], x: BTHK, until: Decay) -> BTHK:
    """Return sum_s pairs_ts x_sk exp(until_tk - until_sk) of a chunk, in fp32; pairs that do not count are 0."""
    T, padding = x.shape[1], (0, -x.shape[1] % BLOCK_TOKENS)
    pairs = jnp.pad(pairs, [(0, 0), (0, 0), padding, padding])
    x, until = _pad_blocks(x), _pad_blocks(until)

    before, earlier = _towards_blocks(x, until)
    rows = einops.rearrange(pairs, "B H (N C) S -> B H N C S", C=BLOCK_TOKENS)
    far = einsum("BHNCS,BNSHK->BNCHK", rows, earlier, EXACT) * jnp.exp(_blocks(until) - before[:, :, None])
    own = jnp.moveaxis(_pairs_of_blocks(pairs), 1, -1)[..., None]  # (B, N, C, C, H, 1)
    causal = jnp.tri(BLOCK_TOKENS, dtype=bool)[None, None]
    decay = jnp.exp(_exponents(_blocks(until), _blocks(until), causal))
    near = jnp.sum(own * decay * _blocks(x)[:, :, None], axis=3)
    return einops.rearrange(far + near, "B N C H K -> B (N C) H K")[:, :T]


def _between_blocks(q: BTHK, k: BTHK, seen: Decay, until: Decay, dtype, precision) -> Float[Array, "B H T S"]:
    """Weigh pairs of different blocks: both decay towards the beginning of the query's block."""
    before, keys = _towards_blocks(k, until)
    queries = _blocks(q) * jnp.exp(_blocks(seen) - before[:, :, None])
    weights = einsum("BNCHK,BNSHK->BHNCS", queries.astype(dtype), keys.astype(dtype), precision)
    return einops.rearrange(weights, "B H N C S -> B H (N C) S")


def _within_blocks(q: BTHK, k: BTHK, seen: Decay, until: Decay, visible) -> Float[Array, "B H T S"]:
    """Weigh pairs of the same block one by one, in fp32."""
    q, k, seen, until = (_blocks(x) for x in (q, k, seen, until))
    decay = jnp.exp(_exponents(seen, until, _pairs_of_blocks(visible[:, None])[:, 0]))
    pairs = jnp.sum(q[:, :, :, None] * k[:, :, None] * decay, axis=-1)  # (B, N, C, C, H)
    same = jnp.eye(pairs.shape[1], dtype=pairs.dtype)[None, None, :, None, :, None]
    weights = einops.rearrange(pairs, "B N C S H -> B H N C 1 S") * same
    return einops.rearrange(weights, "B H N C M S -> B H (N C) (M S)")


def _towards_blocks(k: BTHK, until: Decay) -> tuple[Float[Array, "B N H #K"], Float[Array, "B N S H K"]]:
    """Return the log-decay up to each block, and what is left there of the tokens of earlier blocks, of others 0."""
    before = jnp.pad(until, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1][:, ::BLOCK_TOKENS]
    earlier = jnp.arange(until.shape[1])[None, :] < BLOCK_TOKENS * jnp.arange(before.shape[1])[:, None]
    exponent = jnp.where(earlier[None, :, :, None, None], before[:, :, None] - until[:, None], -jnp.inf)
    return before, k[:, None] * jnp.exp(exponent)


def _exponents(seen: Array, until: Array, mask: Bool[Array, "_ _ C C"]) -> Float[Array, "B N C C H _"]:
    """Return the log-decay of the pairs of each block, -inf where they do not count."""
    return jnp.where(mask[..., None, None], seen[:, :, :, None] - until[:, :, None], -jnp.inf)


def _pairs_of_blocks(x: Shaped[Array, "B H T S"]) -> Shaped[Array, "B H N C C"]:
    """Return the pairs of the same block."""
    blocks = einops.rearrange(x, "B H (N C) (M S) -> B H N C M S", C=BLOCK_TOKENS, S=BLOCK_TOKENS)
    return einops.rearrange(jnp.diagonal(blocks, axis1=2, axis2=4), "B H C S N -> B H N C S")


def _blocks(x: BTHK) -> Float[Array, "B N C H K"]:
    """Cut time, filled up, into blocks."""
    return einops.rearrange(x, "B (N C) H K -> B N C H K", C=BLOCK_TOKENS)


def _pad_blocks(x: Array) -> Array:
    """Fill time up to whole blocks with copies of the last token."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % BLOCK_TOKENS), (0, 0), (0, 0)], mode="edge")


def _pad_pairs(visible):
    padding = (0, -visible.shape[1] % BLOCK_TOKENS)
    return jnp.pad(visible, [(0, 0), padding, padding])


def as_dplr(call: MatrixStateCall) -> MatrixStateCall:
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

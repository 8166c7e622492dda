"""Linear attention whose state decays: one operation for GLA, RetNet, HGRN2, lightning attention, SSD and RWKV-5/6.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          o_t = scale q_t^T S_t          (arXiv 2312.06635, equation 3)

The decay a_t = exp(log_decay_t) is one number for each key channel or one for each head. With a bonus u the state is
read before it is written, and the token itself counts by u instead (RWKV-5/6, arXiv 2404.05892, section 4.2):

    o_t = scale q_t^T (S_{t-1} + diag(u) k_t v_t^T)

The state is (B, H, K, V) fp32. Inside a chunk with cumulative log-decays b_t the pair t >= s has the weight
sum_k q_tk k_sk exp(b_tk - b_sk). No exponent above 0 is ever taken: blocks of `BLOCK` tokens meet through the decay at
the beginning of the later one, and a block meets itself pair by pair.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from based_jax.dims import BHK, BHKV, BHV, BT, BTHK, BTHV
from based_jax.ops import channel_decays, chunks, one_decay, recurrence, scan
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.precision import EXACT, einsum, narrow_einsum, product_policy

CHUNK, BLOCK = 64, 16
SHORT = 256
"""Tokens up to which one chunk is faster in XLA than several, on a GPU, where heads have one decay and large states."""

FEW_STEPS = 1024
"""Where heads have one decay, and the Triton kernels do not run, `auto` goes token by token up to so many tokens: that
is faster than XLA's chunks at 256 tokens, and slower at 2,048 (experiments/kernels)."""
LARGE, SHORT_FOR_KERNELS = 128 * 256, 128
"""Where heads have one decay, states of so many elements go as one chunk in XLA: up to `SHORT` tokens instead of token
by token, and up to `SHORT_FOR_KERNELS` instead of by chunks in Triton. Those of a quarter do not."""

HK = Float[Array, "H K"]
Decay = Float[Array, "B T H #K"]


def initial_state(batch: int, heads: int, key_dim: int, value_dim: int) -> BHKV:
    """Return the state before the first token."""
    return jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32)


def gated_linear_attention(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_decay: Decay,
    *,
    bonus: HK | None = None,
    scale: float | None = None,
    state: BHKV | None = None,
    segment_ids: BT | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Attend over (B, T, H, .) arrays with a decaying state, for any T.

    Args:
      log_decay: at most 0; (B, T, H, K), or (B, T, H, 1) for one decay a head, which takes fewer operations.
      bonus: weight (H, K) of the token itself; the state is then read before it is written.
      scale: of the output; 1 / sqrt(K) where None.
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      return_state: return (o, state after the last token) instead of o.
      impl: "recurrent" (token by token), "oracle" (the same), "xla" (chunked, linear in T), "quadratic" (one chunk;
        auto's for one decay a head, large states and short sequences on a GPU), "hopper" (Mosaic GPU kernels, token by
        token; K at most 128, no bonus), "triton" (chunks on tensor cores; v in bf16, to which q and k are
        rounded; K at most 128, no bonus) or "auto".

    Returns:
      o in v's dtype, or (o, state); the state is fp32.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    xs = (q, k, v, log_decay.astype(jnp.float32))
    o, state = dispatch("gated_linear_attention", IMPLEMENTATIONS, impl, xs, bonus, scale, state, segment_ids)
    return (o, state) if return_state else o


def gated_linear_attention_step(
    q: BHK,
    k: BHK,
    v: BHV,
    log_decay: Float[Array, "B H #K"],
    state: BHKV,
    *,
    bonus: HK | None = None,
    scale: float | None = None,
) -> tuple[BHV, BHKV]:
    """Return one token's output and the state after it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    written = k.astype(jnp.float32)[..., :, None] * v.astype(jnp.float32)[..., None, :]
    after = jnp.exp(log_decay)[..., None] * state + written
    read = after if bonus is None else state + bonus[None, :, :, None] * written
    o = scale * jnp.einsum("BHK,BHKV->BHV", q.astype(jnp.float32), read, precision=EXACT)
    return o.astype(v.dtype), after


def _recurrent(xs, bonus, scale, state, segment_ids) -> tuple[Any, Any]:
    def step(x, state):
        q, k, v, g = x
        return gated_linear_attention_step(q, k, v, g, state, bonus=bonus, scale=scale)

    return scan.over_tokens(step, xs, _empty(xs), state, segment_ids)


def _chunked(xs, bonus, scale, state, segment_ids, *, length: int | None = CHUNK) -> tuple[Any, Any]:
    """Quadratic inside chunks of `length` tokens, through the state between them; None makes it one chunk."""

    def chunk(xs, state: BHKV, span: scan.Span):
        q, k, v, g = xs
        dtype, precision = product_policy(v.dtype)
        until = jnp.cumsum(g, axis=1)  # decay from the chunk's beginning to the state after each token
        seen = until if bonus is None else until - g  # and to the state that each token reads
        q = q.astype(jnp.float32) * scale
        visible = span.visible if bonus is None else span.visible & ~jnp.eye(g.shape[1], dtype=bool)[None]
        weights = pair_weights(q, k.astype(jnp.float32), seen, until, visible, dtype, precision)
        o = narrow_einsum("BHTS,BSHV->BTHV", weights.astype(dtype), v.astype(dtype), precision)
        if bonus is not None:
            own = jnp.sum(q * bonus[None, None] * k.astype(jnp.float32), axis=-1, keepdims=True)
            o = o + own * v.astype(jnp.float32)
        if not span.fresh:
            read = q * jnp.exp(seen) * span.reads[:, :, None, None]
            o = o + einsum("BTHK,BHKV->BTHV", read.astype(dtype), state.astype(dtype), precision)

        left = jnp.exp(until[:, -1:] - until)  # of a token, at the chunk's end
        written = k.astype(jnp.float32) * left * span.writes[:, :, None, None]
        kept = jnp.where(span.keeps[:, None, None, None], state * jnp.exp(until[:, -1])[..., None], 0.0)
        after = kept + einsum("BTHK,BTHV->BHKV", written.astype(dtype), v.astype(dtype), precision)
        return o.astype(v.dtype), after

    return scan.over_chunks(chunk, xs, _empty(xs), state, segment_ids, length or xs[0].shape[1])


def _one_chunk_is_slower(xs, bonus, scale, state, segment_ids) -> str | None:
    """Return why several chunks are the faster XLA form, or None."""
    (_, T, _, K), V = xs[0].shape, xs[2].shape[-1]
    if xs[3].shape[-1] > 1:
        return "each key channel has a decay of its own"
    if T > CHUNK and T * BLOCK > K * V:
        return f"states have {K * V} elements, fewer than {BLOCK} for each of {T} tokens"
    return None if T <= SHORT else f"T is {T}, above {SHORT}"


def pair_weights(q: BTHK, k: BTHK, seen: Decay, until: Decay, visible, dtype, precision) -> Float[Array, "B H T S"]:
    """Return sum_k q_tk k_sk exp(seen_tk - until_sk) of the visible pairs of a chunk, 0 elsewhere."""
    mask = visible[:, None]
    if seen.shape[-1] == 1:
        difference = jnp.moveaxis(seen[..., 0], 1, 2)[..., :, None] - jnp.moveaxis(until[..., 0], 1, 2)[..., None, :]
        decay = jnp.exp(jnp.where(mask, difference, -jnp.inf))
        return narrow_einsum("BTHK,BSHK->BHTS", q.astype(dtype), k.astype(dtype), precision) * decay

    T = q.shape[1]
    q, k, seen, until = (pad_blocks(x) for x in (q, k, seen, until))
    near = _within_blocks(q, k, seen, until, _pad_pairs(visible))
    far = _between_blocks(q, k, seen, until, dtype, precision)
    return jnp.where(mask, far[:, :, :T, :T], 0.0) + near[:, :, :T, :T]


def _between_blocks(q: BTHK, k: BTHK, seen: Decay, until: Decay, dtype, precision) -> Float[Array, "B H T S"]:
    """Weigh pairs of different blocks: both decay towards the beginning of the query's block."""
    q_blocks, seen_blocks = blocks(q), blocks(seen)
    before, exponent = block_starts(until)
    keys = k[:, None] * jnp.exp(exponent)
    queries = q_blocks * jnp.exp(seen_blocks - before[:, :, None])
    weights = einsum("BNCHK,BNSHK->BHNCS", queries.astype(dtype), keys.astype(dtype), precision)
    return weights.reshape(*weights.shape[:2], -1, weights.shape[-1])


def block_starts(until: Decay) -> tuple[Float[Array, "B N H #K"], Float[Array, "B N S H #K"]]:
    """Return the log-decay up to each block, and from every token of an earlier block to it (-inf from others)."""
    before = jnp.pad(until, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1][:, ::BLOCK]
    earlier = jnp.arange(until.shape[1])[None, :] < BLOCK * jnp.arange(before.shape[1])[:, None]
    return before, jnp.where(earlier[None, :, :, None, None], before[:, :, None] - until[:, None], -jnp.inf)


def pairs_of_blocks(x: Shaped[Array, "B H T S"]) -> Shaped[Array, "B H N C C"]:
    """Return the pairs of the same block."""
    N = x.shape[2] // BLOCK
    return jnp.moveaxis(jnp.diagonal(x.reshape(*x.shape[:2], N, BLOCK, N, BLOCK), axis1=2, axis2=4), -1, 2)


def _within_blocks(q: BTHK, k: BTHK, seen: Decay, until: Decay, visible) -> Float[Array, "B H T S"]:
    """Weigh pairs of the same block one by one, in fp32."""
    q, k, seen, until = (blocks(x) for x in (q, k, seen, until))
    B, N, C, H, _ = q.shape
    mask = pairs_of_blocks(visible[:, None])[:, 0]
    exponent = jnp.where(mask[..., None, None], seen[:, :, :, None] - until[:, :, None], -jnp.inf)
    pairs = jnp.sum(q[:, :, :, None] * k[:, :, None] * jnp.exp(exponent), axis=-1)  # (B, N, C, C, H)
    weights = jnp.moveaxis(pairs, -1, 1)[:, :, :, :, None] * jnp.eye(N, dtype=pairs.dtype)[None, None, :, None, :, None]
    return weights.reshape(B, H, N * C, N * C)


def pad_blocks(x: Array) -> Array:
    """Fill time up to whole blocks with copies of the last token."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0)], mode="edge")


def _pad_pairs(visible):
    padding = (0, -visible.shape[1] % BLOCK)
    return jnp.pad(visible, [(0, 0), padding, padding])


def blocks(x: BTHK) -> Float[Array, "B N C H K"]:
    """Cut time, filled up, into blocks."""
    return x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:])


def _empty(xs) -> BHKV:
    q, _, v, _ = xs
    return initial_state(q.shape[0], q.shape[2], q.shape[3], v.shape[3])


def _hopper(xs, bonus, scale, state, segment_ids) -> tuple[Any, Any]:
    q, k, v, log_decay = xs
    state = _empty(xs) if state is None else state
    return recurrence.recurrence(q, k, v, log_decay, (), scale, state, segment_ids)


def _supports(xs, bonus, scale, state, segment_ids) -> str | None:
    return recurrence.supports(xs[0], xs[2]) if bonus is None else "the kernels know no bonus"


def _kernels_are_slower(xs, bonus, scale, state, segment_ids) -> str | None:
    """Return why XLA's products are faster than the kernels, token by token, or None."""
    (_, T, _, K), V = xs[0].shape, xs[2].shape[-1]
    if xs[3].shape[-1] > 1:
        return None
    if T < chunks.FULL and xs[2].dtype == jnp.bfloat16:
        return f"one chunk is faster where heads have one decay, and T is {T}, less than {chunks.FULL}"
    if T > FEW_STEPS:
        return f"products are faster where heads have one decay, and T is {T}, above {FEW_STEPS}"
    return _one_chunk_is_faster(T, SHORT, K * V)


def _one_chunk_is_faster(time: int, most: int, state: int) -> str | None:
    """Return why kernels are slower than one chunk in XLA of at most so many tokens, where heads have one decay."""
    if time <= most and state >= LARGE:
        return f"one chunk is faster where heads have one decay, T is {time} and a state has {state} elements"
    return None


def _triton(xs, bonus, scale, state, segment_ids) -> tuple[BTHV, BHKV]:
    q, k, v, log_decay = xs
    state = _empty(xs) if state is None else state
    if log_decay.shape[-1] == 1:
        return one_decay.one_decay(q, k, v, log_decay, None, scale, state, segment_ids)
    return channel_decays.channel_decays(q, k, v, log_decay, (), scale, state, segment_ids)


def _triton_supports(xs, bonus, scale, state, segment_ids) -> str | None:
    return chunks.supports(xs[2], xs[0].shape[-1]) if bonus is None else "it takes no bonus"


def _triton_is_slower(xs, bonus, scale, state, segment_ids) -> str | None:
    (_, T, _, K), V = xs[0].shape, xs[2].shape[-1]
    slower = chunks.slower(xs[2])
    return slower if slower or xs[3].shape[-1] > 1 else _one_chunk_is_faster(T, SHORT_FOR_KERNELS, K * V)


IMPLEMENTATIONS = {
    "triton": Implementation(_triton, _triton_supports, platform="cuda", slower=_triton_is_slower),
    "hopper": Implementation(_hopper, _supports, platform="cuda", slower=_kernels_are_slower),
    "quadratic": Implementation(
        functools.partial(_chunked, length=None), preferred="cuda", slower=_one_chunk_is_slower
    ),
    "xla": Implementation(_chunked),
    "recurrent": Implementation(_recurrent),
    "oracle": Implementation(_recurrent),
}

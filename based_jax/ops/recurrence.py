"""A matrix state token by token, in Hopper kernels: in fp32, of few tokens, or corrected in many heads at a time.

    u_t = S_{t-1}^T a_t        S_t = diag(w_t) S_{t-1} + b_t u_t^T + k_t v_t^T        o_t = scale S_t^T q_t

A warp keeps a head's state in its registers from the first token to the last (`pallas_kernels/hopper/recurrence.py`).
All is fp32 but the inputs, and no decay is too strong. Chunks (`ops/chunks.py`) do fewer steps one after the other,
and their work on tensor cores.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHKV, BT, BTHK, BTHV
from based_jax.ops import hopper, segments

KEYS, VALUES = (32, 64, 128), (32, 64, 128)
"""Sizes that the kernels take; others are filled up with zeros, and wider values are cut."""
TILE, HEADS = 8, 4
"""What the kernels take multiples of: tokens, and heads of all rows together."""


def supports(q: BTHK, v: BTHV) -> str | None:
    """Return why the kernels cannot run a call, or None; shapes and dtypes are all that they ask for."""
    batch, time, heads, keys = q.shape
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        return f"v must be bfloat16 or float32, and is {v.dtype}"
    if keys > KEYS[-1]:
        return f"K must be at most {KEYS[-1]}, and is {keys}"
    if not q.size * v.size:
        return f"no dimension may be empty, and q is {q.shape}, v {v.shape}"
    elements = batch * max(time, keys) * heads * max(KEYS[-1], v.shape[-1])
    if elements >= hopper.OFFSETS:
        return f"B H max(T, K) max({KEYS[-1]}, V) must be below {hopper.OFFSETS}, and is {elements}"
    return hopper.refusal()


def recurrence(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_decay: Float[Array, "B T H #K"],
    ab: tuple[BTHK, ...],
    scale: float,
    state: BHKV,
    segment_ids: BT | None,
) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads.

    Args:
      log_decay: log w, (B, T, H, K) or (B, T, H, 1).
      ab: a and b, or nothing for a state that only decays.
    """

    def on_device(q, k, v, log_decay, *rest) -> tuple[BTHV, BHKV]:
        *ab, state, segment_ids = rest
        return _on_device(q, k, v, log_decay, ab, scale, state, segment_ids)

    return hopper.per_head(on_device, (q, k, v, log_decay, *ab), state, segment_ids)


def separated(q: BTHK, k: BTHK, v: BTHV, log_decay, ab: Sequence[BTHK], segment_ids: BT | None) -> tuple:
    """Return q, k, v, log_decay, ab, where padding changes nothing and documents forget the ones before, and padding.

    Padding is (B, T, 1, 1), or None where there are no documents.
    """
    if segment_ids is None:
        return q, k, v, log_decay, ab, None
    padding, begins = (x[..., None, None] for x in (segment_ids == 0, segments.begins_later(segment_ids)))
    q, k, v, log_decay, *ab = (jnp.where(padding, 0, x) for x in (q, k, v, log_decay, *ab))
    ab = [*(jnp.where(begins, 0, a) for a in ab[:1]), *ab[1:]]
    return q, k, v, jnp.where(begins, segments.FORGET, log_decay), ab, padding


def _on_device(q, k, v, log_decay, ab, scale, state, segment_ids) -> tuple[BTHV, BHKV]:
    """Fill all sizes up with zeros, which change no state, and cut them off again."""
    (batch, time, heads, keys), values = q.shape, v.shape[-1]
    q, k, v, log_decay, ab, padding = separated(q, k, v, log_decay, ab, segment_ids)
    log_decay = jnp.broadcast_to(log_decay.astype(jnp.float32), q.shape)
    ab = [x.astype(jnp.float32) for x in ab]

    wide = next(size for size in KEYS if size >= keys)
    width = next((size for size in VALUES if size >= max(values, wide // 2)), VALUES[-1])
    parts = -(-values // width)  # of the values of a head, each with queries and keys of its own
    v = hopper.fill(v, {1: TILE, 3: width}).reshape(batch, -1, heads * parts, width)
    state = hopper.fill(state, {2: wide, 3: width}).reshape(batch, heads, wide, parts, width)
    state = jnp.swapaxes(state, 2, 3).reshape(batch, heads * parts, wide, width)
    q, k, log_decay, *ab = (
        jnp.repeat(hopper.fill(x, {1: TILE, 3: wide}), parts, axis=2)
        for x in (q.astype(v.dtype), k.astype(v.dtype), log_decay, *ab)
    )
    rows = HEADS // math.gcd(HEADS, heads * parts)
    arguments = (hopper.fill(x, {0: rows}) for x in (q, k, v, log_decay, state, *ab))
    o, state = _fused(scale, *hopper.vary_alike(*arguments))

    o = o[:batch, :time].reshape(batch, time, heads, -1)[..., :values]
    state = jnp.swapaxes(state[:batch].reshape(batch, heads, parts, wide, width), 2, 3)
    state = state.reshape(batch, heads, wide, -1)[:, :, :keys, :values]
    return (o if padding is None else jnp.where(padding, 0, o)), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(scale, q, k, v, log_decay, state, *ab):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import recurrence as kernels

    options = {"scale": scale, "with_reads": False}
    return tuple(hopper.call(functools.partial(kernels.forward, **options), q, k, v, jnp.exp(log_decay), state, *ab))


def _fused_fwd(scale, q, k, v, log_decay, state, *ab):
    from pallas_kernels.hopper import recurrence as kernels

    w, options = jnp.exp(log_decay), {"scale": scale, "with_reads": bool(ab)}
    o, last, *reads = hopper.call(functools.partial(kernels.forward, **options), q, k, v, w, state, *ab)
    return (o, last), (q, k, v, w, state, ab, reads)


def _fused_bwd(scale, saved, gradients):
    from pallas_kernels.hopper import recurrence_backward as kernels

    q, k, v, w, state, ab, reads = saved
    call = functools.partial(kernels.backward, scale=scale)
    return tuple(hopper.call(call, q, k, v, w, state, *gradients, *ab, *reads))


_fused.defvjp(_fused_fwd, _fused_bwd)

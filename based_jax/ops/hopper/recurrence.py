"""A matrix state token by token, in Hopper kernels: in fp32, of few tokens, or corrected in many heads at a time.

    u_t = S_{t-1}^T a_t        S_t = diag(w_t) S_{t-1} + b_t u_t^T + k_t v_t^T        o_t = scale S_t^T q_t

A warp keeps a head's state in its registers from the first token to the last (`pallas_kernels/hopper/recurrence.py`).
All is fp32 but the inputs, and no decay is too strong. Chunks, which other kernels go by, take fewer steps one after
the other, and work on tensor cores.
"""

import functools
import math

import einops
import jax
import jax.numpy as jnp

from based_jax.dims import BHKV, BTHV
from based_jax.ops import segments, sharded
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.decays import empty_state
from based_jax.ops.hopper import limits

KEY_DIMS, VALUE_DIMS = (32, 64, 128), (32, 64, 128)
"""Sizes that the kernels take; others are filled up with zeros, and wider values are cut."""
TOKEN_MULTIPLE, HEAD_MULTIPLE = 8, 4
"""Of the tokens, and of the heads of all rows together."""


def supports(call: MatrixStateCall) -> str | None:
    """Return why the kernels cannot run a call, or None; shapes and dtypes are all that they ask for."""
    q, v = call.q, call.v
    batch, time, heads, keys = q.shape
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        return f"v must be bfloat16 or float32, and is {v.dtype}"
    if keys > KEY_DIMS[-1]:
        return f"K must be at most {KEY_DIMS[-1]}, and is {keys}"
    if not q.size * v.size:
        return f"no dimension may be empty, and q is {q.shape}, v {v.shape}"
    elements = batch * max(time, keys) * heads * max(KEY_DIMS[-1], v.shape[-1])
    if elements >= limits.MAX_ELEMENTS:
        return f"B H max(T, K) max({KEY_DIMS[-1]}, V) must be below {limits.MAX_ELEMENTS}, and is {elements}"
    return limits.refusal()


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads.

    Without a and b the state only decays.
    """
    return sharded.per_device(_on_device, call)


def _on_device(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Fill all sizes up with zeros, which change no state, and cut them off again."""
    (batch, time, heads, keys), values = call.q.shape, call.v.shape[-1]
    wide = next(size for size in KEY_DIMS if size >= keys)
    width = next((size for size in VALUE_DIMS if size >= max(values, wide // 2)), VALUE_DIMS[-1])
    parts = -(-values // width)  # of the values of a head, each with queries and keys of its own

    call, padding = segments.separated(call)
    state = sharded.fill(empty_state(call) if call.state is None else call.state, {2: wide, 3: width})
    state = einops.rearrange(state, "B H K (P V) -> B (H P) K V", P=parts)
    v = einops.rearrange(sharded.fill(call.v, {1: TOKEN_MULTIPLE, 3: width}), "B T H (P V) -> B T (H P) V", P=parts)

    def widened(x):
        return jnp.repeat(sharded.fill(x, {1: TOKEN_MULTIPLE, 3: wide}), parts, axis=2)

    log_decay = jnp.broadcast_to(call.log_decay, call.q.shape)
    q, k = (widened(x.astype(v.dtype)) for x in (call.q, call.k))
    log_decay, *ab = (widened(x.astype(jnp.float32)) for x in (log_decay, call.a, call.b) if x is not None)
    rows = HEAD_MULTIPLE // math.gcd(HEAD_MULTIPLE, heads * parts)
    arguments = (sharded.fill(x, {0: rows}) for x in (q, k, v, log_decay, state, *ab))
    o, state = _fused(call.scale, *sharded.vary_alike(*arguments))

    o = einops.rearrange(o[:batch, :time], "B T (H P) V -> B T H (P V)", P=parts)[..., :values]
    state = einops.rearrange(state[:batch], "B (H P) K V -> B H K (P V)", P=parts)[:, :, :keys, :values]
    return (o if padding is None else jnp.where(padding, 0, o)), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(scale, q, k, v, log_decay, state, *ab):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import recurrence as kernels

    options = {"scale": scale, "with_reads": False}
    return tuple(sharded.launch(functools.partial(kernels.forward, **options), q, k, v, jnp.exp(log_decay), state, *ab))


def _fused_fwd(scale, q, k, v, log_decay, state, *ab):
    from pallas_kernels.hopper import recurrence as kernels

    w, options = jnp.exp(log_decay), {"scale": scale, "with_reads": bool(ab)}
    o, last, *reads = sharded.launch(functools.partial(kernels.forward, **options), q, k, v, w, state, *ab)
    return (o, last), (q, k, v, w, state, ab, reads)


def _fused_bwd(scale, saved, gradients):
    from pallas_kernels.hopper import recurrence_backward as kernels

    q, k, v, w, state, ab, reads = saved
    backward = functools.partial(kernels.backward, scale=scale)
    return tuple(sharded.launch(backward, q, k, v, w, state, *gradients, *ab, *reads))


_fused.defvjp(_fused_fwd, _fused_bwd)

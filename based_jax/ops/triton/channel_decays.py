"""Gated linear attention and DPLR delta rules with a decay for each key channel, by chunks, in Triton kernels.

The kernels and their equations are in `pallas_kernels/triton/channel_decays*.py`; products are of bf16, sums and the
state fp32.
"""

import functools

import jax
import jax.numpy as jnp

from based_jax.dims import BHKV, BTHV
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.triton import chunks


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads.

    Without a and b the state only decays.
    """
    return chunks.compute(_on_chunks, call)


def _on_chunks(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    ab = () if call.a is None else (call.a, call.b)
    log_decay = jnp.broadcast_to(call.log_decay, call.q.shape)
    return _fused(call.scale, call.q, call.k, call.v, log_decay, call.state, *ab)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(scale, q, k, v, log_decay, state, *ab):
    return _forward(scale, q, k, v, log_decay, state, *ab, with_starts=False)[0]


def _forward(scale, q, k, v, log_decay, state, *ab, with_starts: bool):
    from pallas_kernels.triton import channel_decays as kernels
    from pallas_kernels.triton.inverses import inverses

    queries, keys = (q, *ab[:1]), (k, *ab[1:])
    c = kernels.decay_sums(log_decay)
    made = kernels.products(queries, keys, c, scale=scale)
    t = inverses(made.pairs[3], v.dtype, negated=True) if ab else None
    o, *rest = kernels.forward(made, v, state, t, with_starts=with_starts)
    u, (last, *starts) = rest[: len(ab) // 2], rest[len(ab) // 2 :]
    return (o, last), (queries, keys, v, c, made, t, u, *starts)


def _fused_fwd(scale, *arguments):
    return _forward(scale, *arguments, with_starts=True)


def _fused_bwd(scale, saved, gradients):
    from pallas_kernels import split
    from pallas_kernels.triton import channel_decays_backward as kernels

    queries, keys, v, c, made, t, u, starts = saved
    do, dlast = gradients
    dv, *y, ends, dstate = kernels.reverse(made, do, dlast, t)
    read, written = (do, *y), (v, *u)
    dpairs = kernels.pair_gradients(read, written)
    found = kernels.state_gradients(made, read, written, starts, ends)
    dqueries, dkeys, [dwhole] = split(found, len(read), len(read))
    found = kernels.token_gradients(queries, keys, c, made, dpairs, dqueries, dkeys, scale=scale)
    (dq, *da), (dk, *db), dc = split(found, len(read), len(read))
    return dq, dk, dv, kernels.decay_gradients(dc, dwhole), dstate, *da, *db


_fused.defvjp(_fused_fwd, _fused_bwd)

"""Gated linear attention and the delta rule with one decay a head, by chunks on tensor cores, in Triton kernels.

One decay makes the weights between the tokens of a chunk a matrix that all channels share. The kernels and their
equations are in `pallas_kernels/triton/one_decay.py`; products are of bf16, sums and the state fp32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHKV, BTHV
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.triton import chunks


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads.

    With beta, the rates of the delta rule, it is that; without them gated linear attention.
    """
    return chunks.compute(_on_chunks, call)


def _on_chunks(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    beta = () if call.beta is None else (call.beta,)
    return _fused(call.scale, call.q, call.k, call.v, call.log_decay[..., 0], call.state, *beta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(scale, q, k, v, log_decay, state, *beta):
    return _forward(scale, q, k, v, log_decay, state, *beta, with_starts=False)[0]


def _forward(scale, q, k, v, log_decay, state, *beta, with_starts: bool):
    from pallas_kernels.triton import one_decay as kernels

    log_decay = jax.lax.optimization_barrier(log_decay)  # XLA would fold the sums of a constant, for seconds
    c = jnp.cumsum(_cut(log_decay, kernels.CHUNK_TOKENS), axis=2).reshape(log_decay.shape)
    delta = kernels.Delta.of(q, k, c, *beta) if beta else ()
    o, last, *saved = kernels.forward(q, k, v, c, state, delta, scale=scale, with_starts=with_starts)
    return (o, last), (q, k, c, delta, *saved, *([] if delta else [v]))


def _fused_fwd(scale, *arguments):
    return _forward(scale, *arguments, with_starts=True)


def _fused_bwd(scale, saved, gradients):
    from pallas_kernels.triton import one_decay as kernels

    q, k, c, delta, starts, u = saved
    do, dlast = gradients
    *read, dv, ends, dstate = kernels.reverse(q, k, c, do, dlast, delta, [u] if delta else [], scale=scale)
    rates = (dv, delta.beta) if delta else ()
    dq, dk, dc, *dbeta = kernels.gradients(q, k, u, c, starts, do, ends, rates, scale=scale)
    dbeta = [x.sum(3) + y for x, y in zip(read, dbeta, strict=True)]
    dlog_decay = jax.lax.cumsum(_cut(dc, kernels.CHUNK_TOKENS), axis=2, reverse=True).reshape(dc.shape)
    return dq, dk, dv, dlog_decay, dstate, *dbeta


_fused.defvjp(_fused_fwd, _fused_bwd)


def _cut(x: Float[Array, "B T H"], size: int) -> Float[Array, "B N C H"]:
    """Cut time into chunks."""
    return x.reshape(x.shape[0], -1, size, x.shape[2])

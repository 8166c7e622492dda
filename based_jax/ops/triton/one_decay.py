"""Gated linear attention and the delta rule with one decay a head, by chunks on tensor cores, in Triton kernels.

One decay makes the weights between the tokens of a chunk a matrix that all channels share. The kernels and their
equations are in `pallas_kernels/triton/{one_decay,delta_rule}.py`; products are of bf16, sums and the state fp32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHKV, BTHV
from based_jax.ops import sharded
from based_jax.ops.calls import BTH, MatrixStateCall
from based_jax.ops.triton import chunks


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads.

    With beta, the rates of the delta rule, it is that; without them gated linear attention, of which q and k may be
    those of groups of heads (B, T, G, K).
    """
    return chunks.compute(_on_chunks, call)


def _on_chunks(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    arrays = call.q, call.k, call.v, call.log_decay[..., 0]
    if call.beta is None:
        return _by_pieces(call.scale, *arrays, call.state)
    return _delta_rule(call.scale, *arrays, call.state, call.beta)


def _by_pieces(scale, q, k, v, log_decay, state) -> tuple[BTHV, BHKV]:
    """Cut sequences, where they are few, into pieces that are rows of their own, filled up to the same length."""
    from pallas_kernels.triton import pieces
    from pallas_kernels.triton.chunks import CHUNK_TOKENS, Cut

    cut = Cut.of(k, v)
    count = pieces.count(cut.batch * cut.heads * cut.strips, cut.chunks)
    arrays = (sharded.fill(x, {1: count * CHUNK_TOKENS}) for x in (q, k, v, log_decay))
    o, last = _attention(scale, *(x.reshape(x.shape[0] * count, -1, *x.shape[2:]) for x in arrays), state)
    return o.reshape(cut.batch, -1, *o.shape[2:])[:, : cut.time], last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, q, k, v, log_decay, state):
    """Return o of the pieces, and the states after the last one of each sequence, given those before the first."""
    from pallas_kernels.triton import one_decay as kernels
    from pallas_kernels.triton import pieces

    c = _sums(log_decay)
    o, last = kernels.forward(q, k, v, c, pieces.starts(k, v, c, state), scale=scale, with_starts=False)
    return o, _of_pieces(last, state)[:, -1]


def _attention_fwd(scale, q, k, v, log_decay, state):
    from pallas_kernels.triton import one_decay as kernels
    from pallas_kernels.triton import pieces

    c = _sums(log_decay)
    o, last, starts = kernels.forward(q, k, v, c, pieces.starts(k, v, c, state), scale=scale, with_starts=True)
    return (o, _of_pieces(last, state)[:, -1]), (q, k, v, c, starts)


def _attention_bwd(scale, saved, gradients):
    from pallas_kernels.triton import one_decay as kernels
    from pallas_kernels.triton import pieces, shared_keys

    q, k, v, c, starts = saved
    do, dlast = gradients
    dv, ends, dstate = kernels.reverse(q, k, c, do, pieces.ends(q, do, c, dlast, scale=scale), scale=scale)
    gradients_of_keys = (kernels if k.shape[2] == v.shape[2] else shared_keys).gradients
    dq, dk, dc = gradients_of_keys(q, k, v, c, starts, do, ends, scale=scale)
    return dq, dk, dv, _until_the_end(dc), _of_pieces(dstate, dlast)[:, 0]


def _of_pieces(states, like) -> Float[Array, "B P H K V"]:
    """Return states of all pieces by sequence, of which `like` are as many as there are sequences."""
    return states.reshape(like.shape[0], -1, *like.shape[1:])


_attention.defvjp(_attention_fwd, _attention_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(scale, q, k, v, log_decay, state, beta):
    return _delta_rule_fwd(scale, q, k, v, log_decay, state, beta)[0]


def _delta_rule_fwd(scale, q, k, v, log_decay, state, beta):
    from pallas_kernels.triton import delta_rule as kernels

    c = _sums(log_decay)
    made = kernels.Pairs.of(q, k, c, beta)
    errors, last, starts = kernels.forward(k, v, c, beta, made.t, state)
    o = kernels.outputs(q, c, beta, made.p, errors, starts, scale=scale)
    return (o, last), (q, k, c, beta, made, errors, starts)


def _delta_rule_bwd(scale, saved, gradients):
    from pallas_kernels.triton import delta_rule as kernels

    q, k, c, beta, made, errors, starts = saved
    do, dlast = gradients
    dv, ends, dstate = kernels.reverse(q, k, c, beta, made, do, dlast, scale=scale)
    dq, dk, dc, dbeta = kernels.gradients(q, k, errors, c, beta, made, starts, do, dv, ends, scale=scale)
    return dq, dk, dv, _until_the_end(dc), dstate, dbeta


_delta_rule.defvjp(_delta_rule_fwd, _delta_rule_bwd)


def _sums(log_decay: BTH) -> BTH:
    """Return the sums of log-decays from the beginning of each chunk to each token."""
    log_decay = jax.lax.optimization_barrier(log_decay)  # XLA would fold the sums of a constant, for seconds
    return jnp.cumsum(_cut(log_decay), axis=2).reshape(log_decay.shape)


def _until_the_end(dc: BTH) -> BTH:
    """Return the gradients of log-decays: the sums of those of `_sums` from each token to the end of its chunk."""
    return jax.lax.cumsum(_cut(dc), axis=2, reverse=True).reshape(dc.shape)


def _cut(x: BTH) -> Float[Array, "B N C H"]:
    """Cut time into chunks."""
    from pallas_kernels.triton.chunks import CHUNK_TOKENS

    return x.reshape(x.shape[0], -1, CHUNK_TOKENS, x.shape[2])

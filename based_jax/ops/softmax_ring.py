"""Softmax attention whose tokens lie over devices: keys and values go round (arXiv 2310.01889).

A device's queries meet the keys of its own piece, and then those of each piece before it, which its neighbours hand on.
What they read of each piece, o_i, and the logarithm L_i of its weights' sum are joined:

    o = sum_i exp(L_i - L) o_i          L = log sum_i exp(L_i)

In the backward pass keys and values go round again, and their gradients with them. Scores are made by chunks
(`ops/softmax_chunks.py`), also those of later pieces, which nobody sees: of n devices the last one needs all n rounds.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Integer

from based_jax.dims import BTHK, BTHV
from based_jax.ops import sequence, sharded, softmax_chunks
from based_jax.ops.calls import AttentionCall

Numbers = Integer[Array, "#B T"]


def cut(run: sequence.Run, call: AttentionCall) -> BTHV:
    """Return attention to all keys before, each device for its piece of time; a `sequence.Cut`.

    Heads that the devices can share are exchanged for time, whatever the form, and others' keys go round.
    """
    if sharded.part_of_device("heads", call.q.shape[2]) % sequence.pieces(call) == 0:
        return sequence.by_heads(run, call)
    return sharded.per_device(_on_device, call)


def _on_device(call: AttentionCall) -> BTHV:
    tokens, ids = call.q.shape[1], call.segment_ids
    numbers = jnp.ones((1, tokens), jnp.int32) if ids is None else sequence.numbers_over_pieces(ids)
    chunk = min(softmax_chunks.CHUNK_TOKENS, tokens)
    arrays = (sharded.fill(x, {1: chunk}) for x in (call.q, call.k, call.v, numbers))
    return _attention(call.root, *sharded.vary_alike(*arrays))[:, :tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(root: float, q: BTHK, k: BTHK, v: BTHV, numbers: Numbers) -> BTHV:
    return _forward(root, q, k, v, numbers)[0]


def _forward(root, q, k, v, numbers):
    own, before = _cuts(q.shape[1], root)
    o, saved = softmax_chunks.forward(own, q, k, v, numbers, numbers)

    def meet(carry, distance):
        keys, joined = sharded.handed_on(carry[0]), carry[1]
        k, v, key_numbers = keys
        o, saved = softmax_chunks.forward(before, q, k, v, numbers, _seen(key_numbers, distance))
        return (keys, softmax_chunks.joined(joined, (o, saved[-1]))), None

    start = (k, v, numbers), (o.astype(jnp.float32), saved[-1])
    (_, (o, logarithm)), _ = lax.scan(meet, start, _distances())
    o = o.astype(v.dtype)
    return o, (q, k, v, numbers, o, logarithm)


def _backward(root, saved, do):
    q, k, v, numbers, o, logarithm = saved
    own, before = _cuts(q.shape[1], root)

    def gradients(cut, k, v, key_numbers):
        found = softmax_chunks.backward(cut, (q, k, v, numbers, key_numbers, o, logarithm), do)[:3]
        return [x.astype(jnp.float32) for x in found]

    def meet(carry, distance):
        dq, *going_round = carry
        k, v, key_numbers, dk, dv = sharded.handed_on(going_round)
        more = gradients(before, k, v, _seen(key_numbers, distance))
        return (dq + more[0], k, v, key_numbers, dk + more[1], dv + more[2]), None

    dq, dk, dv = gradients(own, k, v, numbers)
    (dq, _, _, _, dk, dv), _ = lax.scan(meet, (dq, k, v, numbers, dk, dv), _distances())
    dk, dv = sharded.handed_on((dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _cuts(tokens: int, root: float) -> tuple[softmax_chunks.Cut, softmax_chunks.Cut]:
    """Return how the queries of a piece meet the keys of their own, and those of one before it."""
    own, before = (softmax_chunks.Cut.of(tokens, tokens, past, past + tokens, root) for past in (0, tokens))
    return own, before


def _distances() -> Integer[Array, "_"]:
    return jnp.arange(1, sharded.count_in_time())


def _seen(key_numbers: Numbers, distance: Array) -> Numbers:
    """Return the numbers of keys that come so many pieces before, zero where there is no such piece."""
    return jnp.where(sharded.place_in_time() >= distance, key_numbers, 0)

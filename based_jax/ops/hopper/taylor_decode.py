"""Decoding with Taylor attention through the Mosaic GPU kernel: which calls it takes, and what it leaves.

Kernel: `pallas_kernels/hopper/taylor_decode.py`.
"""

import jax.numpy as jnp

from based_jax.ops import sharded
from based_jax.ops.decode_calls import TaylorDecodeCall, TaylorSums
from based_jax.ops.hopper import limits

FEATURE_DIM = 16
ROOM_MULTIPLE, VALUE_MULTIPLE = 16, 16
MAX_VALUES = 512
"""Of all tokens of a head: so many sums a warpgroup's registers hold."""


def supports(call: TaylorDecodeCall) -> str | None:
    """Return why the kernel cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    tokens, value_dim = v.shape[1], v.shape[3]
    if call.tokens is None:
        return "the state must have recent tokens, and flush is 1"
    if {x.dtype for x in (q, k, v, *call.tokens)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k, v and recent tokens must be bfloat16; q is {q.dtype}, recent keys are {call.tokens[0].dtype}"
    if q.shape[3] != FEATURE_DIM:
        return f"K must be {FEATURE_DIM}, and is {q.shape[3]}"
    if value_dim % VALUE_MULTIPLE or tokens * value_dim > MAX_VALUES:
        most = MAX_VALUES // tokens
        return f"V must be a multiple of {VALUE_MULTIPLE} up to {most} for {tokens} tokens, and is {value_dim}"
    if (room := call.tokens[0].shape[2]) % ROOM_MULTIPLE:
        return f"flush must be a multiple of {ROOM_MULTIPLE}, and is {room}"
    return limits.refusal() or sharded.varying_refusal(call)


def compute(call: TaylorDecodeCall):
    """Return o, the sums, the recent tokens and how many they are, each device for its rows and heads."""
    return sharded.per_device(_shard, call, check_vma=False)  # what is written in place may not vary


def _shard(call: TaylorDecodeCall):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import taylor_decode as kernels

    q, k, v, sums, tokens, length = call
    assert tokens is not None and length is not None, "`supports` demands recent tokens"
    o, values, *scales, normaliser, recent_k, recent_v = sharded.launch(kernels.decode, q, k, v, *sums, *tokens, length)
    more = length + q.shape[1]
    after = jnp.where(more > recent_k.shape[2], q.shape[1], more)
    return o, TaylorSums(values, next(iter(scales), None), normaliser), (recent_k, recent_v), after

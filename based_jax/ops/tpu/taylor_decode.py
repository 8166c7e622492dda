"""Decoding with Taylor attention through the Mosaic TPU kernel: which calls it takes, and what it leaves.

Rows of the batch lie on lanes, of which a TPU has 128. Kernel: `pallas_kernels/tpu/taylor_decode.py`.
"""

import jax.numpy as jnp

from based_jax.ops import sharded
from based_jax.ops.decode_calls import TaylorDecodeCall, TaylorSums

DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
LANES = 128


def supports(call: TaylorDecodeCall) -> str | None:
    """Return why the kernel cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    if call.tokens is None:
        return "the state must have recent tokens, and flush is 1"
    if len(dtypes := {x.dtype for x in (q, k, v, *call.tokens)}) > 1 or q.dtype not in DTYPES:
        return (
            f"q, k, v and recent tokens must all be bfloat16 or float32, and are {', '.join(sorted(map(str, dtypes)))}"
        )
    if not q.size * v.size:
        return f"no dimension may be empty, and q is {q.shape}, v {v.shape}"
    if (plan := _plan(call)).most_features < 1:
        sizes = f"{plan.room} recent tokens with {plan.keys} + {plan.values} channels"
        return f"VMEM does not hold {plan.lanes} rows of {sizes}"
    return sharded.mesh_refusal()


def _plan(call: TaylorDecodeCall):
    from pallas_kernels.tpu import taylor_decode as kernels

    assert call.tokens is not None, "`supports` has asked"
    (rows, tokens, heads, keys), (values, room) = call.q.shape, (call.v.shape[3], call.tokens[0].shape[2])
    rows = sharded.part_of_device("batch", rows)
    return kernels.Plan(rows, heads, tokens, keys, values, room, call.sums.values.dtype, call.q.dtype)


def slower(call: TaylorDecodeCall) -> str | None:
    """Return why `auto` leaves a call to XLA, or None."""
    rows = sharded.part_of_device("batch", call.q.shape[0])
    return f"rows come {LANES} at a time, and a device has {rows}" if rows % LANES else None


def compute(call: TaylorDecodeCall):
    """Return o, the sums, the recent tokens and how many they are, each device for its rows and heads."""
    return sharded.per_device(_shard, call, check_vma=False)  # what is written in place may not vary


def _shard(call: TaylorDecodeCall):
    # Pallas' TPU modules take half a second to import and are needed only here.
    from pallas_kernels.tpu import taylor_decode as kernels

    q, k, v, sums, tokens, length = call
    assert tokens is not None and length is not None, "`supports` demands recent tokens"
    before = jnp.where(length + q.shape[1] > tokens[0].shape[2], 0, length)
    by_head = [None if x is None else jnp.moveaxis(x, 0, -1) for x in (q, k, v, *sums, *tokens)]
    results = sharded.launch(kernels.decode, *by_head, length, before)
    o, values, *scales, normaliser, recent_k, recent_v = (jnp.moveaxis(x, -1, 0) for x in results)
    after = TaylorSums(values, next(iter(scales), None), normaliser)
    return o, after, (recent_k, recent_v), before + q.shape[1]

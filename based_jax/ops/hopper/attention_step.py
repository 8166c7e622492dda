"""Softmax attention of one token over a short cache in a Hopper kernel: which calls it takes.

Kernel: `pallas_kernels/hopper/attention_step.py`. It has no gradient: a step decodes.
"""

import math

import jax
import jax.numpy as jnp

from based_jax.dims import BHV, BSGK, BSGV
from based_jax.ops import sharded
from based_jax.ops.decode_calls import AttentionStepCall, RingStepCall
from based_jax.ops.hopper import limits

HEAD_MULTIPLE, CHANNEL_MULTIPLE, MAX_CHANNELS = 16, 16, 128
LEAST_ROWS, MOST_KEYS = 64, 256
"""Of a call that is faster here: a block reads a row's keys, 129 of which took half the time of Triton's splits with
128 rows on one H200; fewer rows leave multiprocessors idle, and longer caches were not timed."""


def supports(call: AttentionStepCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, and is {x.dtype}"
    (heads, channels), groups, values = call.q.shape[1:], call.k.shape[2], call.v.shape[3]
    if heads % HEAD_MULTIPLE or not heads or groups != heads:
        return f"heads must be a multiple of {HEAD_MULTIPLE}, each with its keys, and are {heads} with keys of {groups}"
    if channels % CHANNEL_MULTIPLE or not 0 < channels <= MAX_CHANNELS or values != channels:
        wanted = f"a multiple of {CHANNEL_MULTIPLE} up to {MAX_CHANNELS}, of values as of keys"
        return f"head dims must be {wanted}, and are {channels} and {values}"
    if not call.k.size:
        return f"there must be keys, and the cache is {call.k.shape}"
    return limits.refusal()


def supports_ring(call: RingStepCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    queries = call.heads.shape[1] - 2 * call.k.shape[2]
    if jax.sharding.get_abstract_mesh().size > 1:
        return "it runs on one device, and there is a mesh"
    return supports(AttentionStepCall(call.heads[:, :queries], call.k, call.v, call.length))


def slower_ring(call: RingStepCall) -> str | None:
    """Return why another implementation is faster, or None: with 1 row the kernel took 17 us on one H200."""
    return slower(AttentionStepCall(call.heads, call.k, call.v, call.length))


def slower(call: AttentionStepCall) -> str | None:
    """Return why another implementation is faster, or None."""
    rows, keys = call.k.shape[:2]
    if rows < LEAST_ROWS or keys > MOST_KEYS:
        return f"it is faster from {LEAST_ROWS} rows on with at most {MOST_KEYS} keys, and there are {rows} with {keys}"
    return None


def compute(call: AttentionStepCall) -> BHV:
    """Return o of this device's rows and heads."""
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import attention_step as kernels

    length = jnp.minimum(call.length, call.k.shape[1]).astype(jnp.int32)
    [o] = sharded.launch(kernels.step, call.q, call.k, call.v, length, scale=1 / call.root)
    return o


def compute_ring(call: RingStepCall) -> tuple[BHV, BSGK, BSGV]:
    """Return o, and the ring with the token, in the place of the one given."""
    from pallas_kernels.hopper import attention_step as kernels

    cos, sin = jnp.cos(call.angles), jnp.sin(call.angles)
    turns = jnp.stack([jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)], axis=1)
    length, scale = call.length.astype(jnp.int32), 1 / math.sqrt(call.k.shape[3])
    o, k, v = kernels.ring_step(call.heads, call.k, call.v, length, turns.astype(jnp.float32), scale=scale)
    return o, k, v

"""Softmax attention to a short sliding window through the Mosaic TPU kernels: which calls they take, and gradients.

The backward pass saves q, k and v alone. Arrays go to the kernels with tokens last, as projections can write them.
Kernels: `pallas_kernels/tpu/window.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.dims import BTHV
from based_jax.ops import sharded
from based_jax.ops.calls import AttentionCall

DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
HEAD_MULTIPLE, MAX_HEAD_DIM = 16, 256
MAX_WINDOW = 129


def supports(call: AttentionCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    if len(dtypes := {x.dtype for x in (q, k, v)}) > 1 or q.dtype not in DTYPES:
        return f"q, k and v must all be bfloat16 or float32, and are {', '.join(sorted(map(str, dtypes)))}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, and are {q.shape[3]} and {v.shape[3]}"
    if call.sinks:
        return f"the kernels read windows alone, and {call.sinks} sinks are asked for"
    if call.window > MAX_WINDOW:
        return f"the window must be at most {MAX_WINDOW} keys, and is {call.window}"
    if not q.size * v.size:
        return f"no dimension may be empty, and q is {q.shape}, v {v.shape}"
    return sharded.mesh_refusal()


def compute(call: AttentionCall) -> BTHV:
    """Return o, each device for its rows and heads; zero at padding."""
    return sharded.per_device(_on_device, call, check_vma=False)


def _on_device(call: AttentionCall) -> BTHV:
    from pallas_kernels.tpu import window as kernels

    block = kernels.block_tokens(call.q.shape[1])
    q, k, v = (sharded.fill(x, {1: block, 3: HEAD_MULTIPLE}) for x in (call.q, call.k, call.v))
    tokens = sharded.vary_alike(*(jnp.transpose(x, (0, 2, 3, 1)) for x in (q, k, v)), _first_keys(call, q.shape[1]))
    o = _attention(call.window, call.root, *tokens)
    return jnp.transpose(o, (0, 3, 1, 2))[:, : call.q.shape[1], :, : call.v.shape[3]]


def _first_keys(call: AttentionCall, length: int) -> Int[Array, "_ 1 {length}"]:
    """Return the place of the first key that each query sees, behind all places where it sees none.

    Documents are unbroken: their numbers change where they begin.
    """
    place = jnp.arange(call.q.shape[1], dtype=jnp.int32)[None]
    first = jnp.maximum(place - (call.window - 1), 0)
    if (numbers := call.segment_ids) is not None:
        begins = jnp.diff(numbers, axis=1, prepend=0) != 0
        first = jnp.maximum(first, jax.lax.cummax(jnp.where(begins, place, 0), axis=1))
        first = jnp.where(numbers == 0, length, first)
    missing = length - call.q.shape[1]
    return jnp.pad(first, [(0, 0), (0, missing)], constant_values=length)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(window: int, root: float, q, k, v, first):
    return _attention_fwd(window, root, q, k, v, first)[0]


def _attention_fwd(window: int, root: float, q, k, v, first):
    # Pallas' TPU modules take half a second to import and are needed only here and below.
    from pallas_kernels.tpu import window as kernels

    walk = functools.partial(kernels.forward, window=window, scale=1 / root)
    [o] = sharded.launch(walk, q, k, v, first)
    return o, (q, k, v, first)


def _attention_bwd(window: int, root: float, saved, do):
    from pallas_kernels.tpu import window as kernels

    q, k, v, first = saved
    walk = functools.partial(kernels.gradients, window=window, scale=1 / root)
    return *sharded.launch(walk, q, k, v, do, first), None


_attention.defvjp(_attention_fwd, _attention_bwd)

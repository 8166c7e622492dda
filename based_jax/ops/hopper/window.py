"""Softmax attention to a sliding window through the Mosaic GPU kernels: which calls they take, and gradients.

The backward pass saves q, k and v alone: a kernel that reads them sees all of a query's keys, and makes its softmax
again. Kernels: `pallas_kernels/hopper/window*.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.dims import BT, BTHK, BTHV
from based_jax.ops import segments, sharded
from based_jax.ops.calls import AttentionCall
from based_jax.ops.hopper import limits
from based_jax.ops.hopper.limits import CHUNK_TOKENS

HEAD_DIMS = (64, 112, 128)
MAX_WINDOW = 2 * CHUNK_TOKENS + 1


def supports(call: AttentionCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v must be bfloat16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] not in HEAD_DIMS or v.shape[3] != q.shape[3]:
        return f"head dims must be equal and one of {HEAD_DIMS}, and are {q.shape[3]} and {v.shape[3]}"
    if call.sinks:
        return f"the kernels read windows alone, and {call.sinks} sinks are asked for"
    if call.window > MAX_WINDOW:
        return f"the window must be at most {MAX_WINDOW} keys, and is {call.window}"
    if 0 in q.shape:
        return "there must be a token"
    return limits.refusal()


def compute(call: AttentionCall) -> BTHV:
    """Return o, each device for its rows and heads."""
    return sharded.per_device(lambda own: _attention(own.q, own.k, own.v, own.segment_ids, own.window), call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, segment_ids, window):
    return _attention_fwd(q, k, v, segment_ids, window)[0]


def _attention_fwd(q, k, v, segment_ids, window):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import window as kernels

    pieces = number_of_pieces(q, blocks=kernels.resident(q.shape[3]), shared=kernels.reach(window))
    [o] = sharded.launch(
        kernels.forward, *limits.pad_time(q, k, v), _pad_ids(segment_ids), window=window, pieces=pieces
    )
    return o[:, : q.shape[1]], (q, k, v, segment_ids)


def _attention_bwd(window, saved, do):
    from pallas_kernels.hopper import window as kernels
    from pallas_kernels.hopper import window_backward as backward

    q, k, v, segment_ids = saved
    pieces = number_of_pieces(q, blocks=1, shared=2 * kernels.reach(window))
    arrays = *limits.pad_time(q, k, v, do), _pad_ids(segment_ids)
    gradients = sharded.launch(backward.gradients, *arrays, window=window, pieces=pieces)
    return *(x[:, : q.shape[1]] for x in gradients), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def number_of_pieces(q: BTHK, *, blocks: int, shared: int) -> int:
    """Return how many pieces of each sequence take the least time.

    A multiprocessor holds so many `blocks`, each with one piece; a piece takes a time for each of its chunks and of
    those that it has in `shared` with its neighbours.
    """
    batch, time, heads, _ = q.shape
    chunks, resident = -(-time // CHUNK_TOKENS), limits.multiprocessors() * blocks

    def duration(pieces: int) -> int:
        waves = -(-batch * heads * pieces // resident)
        return waves * (-(-chunks // pieces) + shared)

    return min(range(1, min(chunks, resident) + 1), key=duration)


def _pad_ids(segment_ids: BT | None) -> Int[Array, "B _"] | None:
    """Return ids with padding up to whole chunks, and one id for all of a row that the kernels cannot read."""
    from pallas_kernels.hopper.window import UNREADABLE_ID

    if segment_ids is None:
        return None
    ids = jnp.where(segments.padding_within(segment_ids), UNREADABLE_ID, segment_ids)
    return jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, -ids.shape[1] % CHUNK_TOKENS)))

"""Softmax attention on TPUs through JAX's splash attention: which calls it takes, and how arrays are filled up for it.

Keys that nobody of a block of queries sees are skipped, after a query and, with a window, long before it. Source:
jax.experimental.pallas.ops.tpu.splash_attention.
"""

from typing import Any

import jax
import jax.numpy as jnp

from based_jax.dims import BTHV
from based_jax.ops import sharded
from based_jax.ops.calls import AttentionCall

BLOCK_TOKENS, MIN_BLOCK_TOKENS = 512, 128
BLOCKS = (
    *("block_q", "block_kv", "block_kv_compute"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    *("block_q_dq", "block_kv_dq"),
)
"""What splash attention calls the tokens of a block, forward and for the gradients."""
HEAD_MULTIPLE, MAX_HEAD_DIM = 64, 256
MAX_TOKENS = 1 << 17
"""Of a sequence: what the kernel keeps of each pair of blocks is held in scalar memory."""


def supports(call: AttentionCall) -> str | None:
    """Return why the kernel cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v must be bfloat16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, and are {q.shape[3]} and {v.shape[3]}"
    if q.shape[1] > MAX_TOKENS:
        return f"there must be at most {MAX_TOKENS} tokens, and are {q.shape[1]}"
    if call.sinks and call.segment_ids is not None:
        return f"its masks are of whole rows, and {call.sinks} sinks of packed documents are asked for"
    if 0 in q.shape:
        return "there must be a token"
    return sharded.mesh_refusal() or sharded.varying_refusal(call)


def compute(call: AttentionCall, *, interpret: bool = False) -> BTHV:
    """Return o, each device for its rows and heads; zero at padding."""
    tokens = "batch", None, "heads"

    def shard(q, k, v, segment_ids):
        return _attention(call._replace(q=q, k=k, v=v, segment_ids=segment_ids), interpret)

    arrays, names = (call.q, call.k, call.v, call.segment_ids), (tokens, tokens, tokens, ("batch",))
    return sharded.per_shard(shard, arrays, names, (tokens,), check_vma=False)


def _attention(call: AttentionCall, interpret: bool):
    # Pallas' TPU modules take half a second to import and are needed only here.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    from based_jax.ops.tpu.band import Band

    q, k, v, window, segment_ids, _, sinks = call
    time, block = q.shape[1], min(BLOCK_TOKENS, -(-q.shape[1] // MIN_BLOCK_TOKENS) * MIN_BLOCK_TOKENS)
    scaled = (q.astype(jnp.float32) / call.root).astype(q.dtype)
    filled = (sharded.fill(x, {1: block, 3: HEAD_MULTIPLE}) for x in (scaled, k, v))
    by_head = [jnp.swapaxes(x, 1, 2) for x in filled]
    length = by_head[0].shape[2]
    blocks: dict[str, Any] = dict.fromkeys(BLOCKS, block)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([Band(length, min(window, length), sinks)] * q.shape[2]),
        block_sizes=splash.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if segment_ids is None:
        o = jax.vmap(kernel)(*by_head)
    else:
        ids = sharded.fill(segment_ids.astype(jnp.int32), {1: block})
        o = jax.vmap(kernel)(*by_head, splash.SegmentIds(ids, ids))
    o = jnp.swapaxes(o, 1, 2)[:, :time, :, : v.shape[3]]
    # Tokens of padding see each other.
    return o if segment_ids is None else jnp.where(segment_ids[..., None, None] == 0, 0, o)

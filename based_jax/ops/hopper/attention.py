"""Softmax attention through the Mosaic GPU kernels: which calls they take, how arrays are filled up, and gradients.

Tiles of another document are passed over. Kernels: `pallas_kernels/hopper/attention*.py`, in two forms: a block is for
one tile, or it takes tile after tile of narrow heads, and its warpgroups take turns.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from based_jax.dims import BTHV
from based_jax.ops import sharded, softmax_walks
from based_jax.ops.calls import AttentionCall
from based_jax.ops.hopper import limits

MAX_HEAD_DIM, MAX_TURNS_HEAD_DIM = 256, 80
DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)


def supports(call: AttentionCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in DTYPES:
        return f"q, k and v must all be bfloat16 or float16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, and are {q.shape[3]} and {v.shape[3]}"
    if 0 in q.shape:
        return "there must be a token"
    return limits.refusal()


def supports_turns(call: AttentionCall) -> str | None:
    """Return why the kernels that take turns cannot run this call, or None."""
    if max(call.q.shape[3], call.v.shape[3]) > MAX_TURNS_HEAD_DIM:
        return f"head dims must be at most {MAX_TURNS_HEAD_DIM}, and are {call.q.shape[3]} and {call.v.shape[3]}"
    return supports(call)


def compute(call: AttentionCall) -> BTHV:
    """Return o, each device for its rows and heads; zero at padding."""
    return sharded.per_device(functools.partial(_on_device, "tiles"), call)


def compute_by_turns(call: AttentionCall) -> BTHV:
    """Return what `compute` does."""
    return sharded.per_device(functools.partial(_on_device, "turns"), call)


def _kernels(form: str) -> tuple[ModuleType, ModuleType]:
    """Return the kernels of a form: of the forward pass, and of the backward pass."""
    from pallas_kernels.hopper import attention, attention_backward, attention_turns, attention_turns_backward

    forms = {
        "tiles": (attention, attention_backward),
        "turns": (attention_turns, attention_turns_backward),
    }
    return forms[form]


def _on_device(form: str, call: AttentionCall) -> BTHV:
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper.attention_walk import HEAD_MULTIPLE, OWN_TOKENS

    q, k, v, ids = call.q, call.k, call.v, call.segment_ids
    numbers = jnp.ones(q.shape[:2], jnp.int32) if ids is None else ids.astype(jnp.int32)
    time, scale, largest = q.shape[1], 1 / call.root, max(q.shape[3], v.shape[3])
    channels = -(-largest // HEAD_MULTIPLE) * HEAD_MULTIPLE
    arrays = (sharded.fill(x, {1: OWN_TOKENS, 3: channels}) for x in (q, k, v))
    filled = sharded.vary_alike(*arrays, sharded.fill(numbers, {1: OWN_TOKENS}))
    return _attention(form, scale, time if ids is None else None, *filled)[:, :time, :, : v.shape[3]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(form, scale, time, q, k, v, numbers):
    return _attention_fwd(form, scale, time, q, k, v, numbers)[0]


def _attention_fwd(form, scale, time, q, k, v, numbers):
    from pallas_kernels.hopper.attention_walk import OWN_TOKENS

    documents = softmax_walks.documents(numbers, time)
    arrays = q, k, v, *_sight(documents), documents.keys_of_queries(OWN_TOKENS)
    o, logarithm = sharded.launch(_kernels(form)[0].forward, *arrays, scale=scale)
    return o, (q, k, v, numbers, o, logarithm)


def _attention_bwd(form, scale, time, saved, do):
    from pallas_kernels.hopper.attention_backward import own_keys_of
    from pallas_kernels.hopper.attention_walk import OWN_TOKENS

    q, k, v, numbers, o, logarithm = saved
    backward, documents = _kernels(form)[1], softmax_walks.documents(numbers, time)
    minus_delta = -jnp.einsum("BTHV,BTHV->BHT", do.astype(jnp.float32), o.astype(jnp.float32))
    arrays = q, k, v, do, logarithm, minus_delta, *_sight(documents)
    over_keys, over_queries = documents.keys_of_queries(OWN_TOKENS), documents.queries_of_keys(own_keys_of(q.shape[3]))
    [dq] = sharded.launch(backward.query_gradients, *arrays, over_keys, scale=scale)
    dk, dv = sharded.launch(backward.key_gradients, *arrays, over_queries, scale=scale)
    return dq, dk, dv, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _sight(documents: softmax_walks.Documents | softmax_walks.OneDocument):
    """Return where the first key stands that each query sees, T at padding, and where each key stands, -1 there."""
    keys = documents.keys()
    return documents.first_keys(keys.shape[1], 1), keys

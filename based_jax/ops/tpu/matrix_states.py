"""Matrix states that decay, by chunks in TPU kernels: gated linear attention, the delta rule, low rank transitions.

Kernels and equations: `pallas_kernels/tpu/matrix_states.py`. Products are of v's dtype, sums and the state fp32. The
backward pass keeps the state before each chunk, in v's dtype, and makes the rest anew.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from based_jax.dims import BHKV, BTHV
from based_jax.ops import segments, sharded
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.decays import MIN_LOG_DECAY, empty_state

DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
MAX_KEY_DIM, MAX_VALUE_DIM, DIM_MULTIPLE = 256, 512, 16


def supports(call: MatrixStateCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    v, keys = call.v, call.k.shape[3]
    if v.dtype not in DTYPES:
        return f"v must be bfloat16 or float32, and is {v.dtype}"
    if keys > MAX_KEY_DIM or v.shape[3] > MAX_VALUE_DIM:
        return f"K must be at most {MAX_KEY_DIM} and V {MAX_VALUE_DIM}, and they are {keys} and {v.shape[3]}"
    if not v.size * keys:
        return f"no dimension may be empty, and K is {keys}, v {v.shape}"
    return sharded.mesh_refusal()


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return sharded.per_device(_on_device, call, check_vma=False)


def _on_device(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return what `compute` does, of one shard: any sizes are filled up with zeros, which change no state."""
    # Pallas' TPU modules take half a second to import and are needed only here and below.
    from pallas_kernels.tpu import matrix_states as kernels

    (_, time, _, keys), values = call.q.shape, call.v.shape[3]
    call, _ = segments.separated(call)  # padding has queries of 0, and so its outputs are 0
    chunk, state = kernels.chunk_tokens(time), empty_state(call) if call.state is None else call.state
    log_decay = jnp.maximum(call.log_decay.astype(jnp.float32), MIN_LOG_DECAY)
    by_channel = call.a is not None or log_decay.shape[3] > 1

    def by_head(x):
        return jnp.swapaxes(sharded.fill(x, {1: chunk, 3: DIM_MULTIPLE}), 1, 2)

    def of_head(x):
        return jnp.swapaxes(sharded.fill(x.astype(jnp.float32), {1: chunk}), 1, 2)[:, :, None]

    def rounded(x):
        return None if x is None else by_head(x.astype(call.v.dtype))

    q, k, v, a, b = map(rounded, (call.q, call.k, call.v, call.a, call.b))
    decay = by_head(jnp.broadcast_to(log_decay, call.k.shape)) if by_channel else of_head(log_decay[..., 0])
    tokens = kernels.Tokens(q, k, v, decay, None if call.beta is None else of_head(call.beta), a, b)
    state = state.astype(jnp.float32)
    filled = jnp.swapaxes(sharded.fill(state, {2: DIM_MULTIPLE, 3: DIM_MULTIPLE}), 2, 3)
    leaves, tree = jax.tree.flatten((tokens, filled))
    o, state = _attention(call.scale, *jax.tree.unflatten(tree, sharded.vary_alike(*leaves)))
    return jnp.swapaxes(o, 1, 2)[:, :time, :, :values], jnp.swapaxes(state, 2, 3)[:, :, :keys, :values]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale: float, tokens: Any, state):
    return tuple(_forward(scale, tokens, state, with_starts=False))


def _forward(scale: float, tokens: Any, state, *, with_starts: bool):
    from pallas_kernels.tpu import matrix_states as kernels

    walk = functools.partial(kernels.forward, scale=scale, with_starts=with_starts)
    return sharded.launch(lambda state, *given: walk(kernels.Tokens(*given), state), state, *tokens)


def _attention_fwd(scale: float, tokens: Any, state):
    o, last, starts = _forward(scale, tokens, state, with_starts=True)
    return (o, last), (tokens, starts)


def _attention_bwd(scale: float, saved, gradients):
    from pallas_kernels.tpu import matrix_states as kernels

    (tokens, starts), walk = saved, functools.partial(kernels.reverse, scale=scale)
    *found, dstate = sharded.launch(
        lambda starts, do, dlast, *given: walk(kernels.Tokens(*given), starts, do, dlast), starts, *gradients, *tokens
    )
    rest = iter(found)
    dtokens: list[Any] = [None if x is None else next(rest) for x in tokens]
    return kernels.Tokens(*dtokens), dstate


_attention.defvjp(_attention_fwd, _attention_bwd)

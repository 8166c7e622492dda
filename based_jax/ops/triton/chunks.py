"""Matrix states by chunks of tokens, in Triton kernels: what they ask for, and how arrays are filled up for them.

Which kernels take a call depends on its decays: `one_decay.py` or `channel_decays.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from based_jax import devices
from based_jax.dims import BHKV, BTHV
from based_jax.ops import segments, sharded
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.decays import MIN_LOG_DECAY, empty_state
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.triton import limits

KEY_DIMS = (16, 32, 64, 128, 256)
"""Sizes of keys; others are filled up with zeros."""


def supports(v: BTHV, keys: int) -> str | None:
    """Return why no kernels can run a call with keys of that size, or None."""
    if reason := limits.missing_packages():
        return reason
    if v.dtype != jnp.bfloat16:
        return f"v must be bfloat16, and is {v.dtype}"
    if keys > KEY_DIMS[-1]:
        return f"K must be at most {KEY_DIMS[-1]}, and is {keys}"
    if not v.size * keys:
        return f"no dimension may be empty, and K is {keys}, v {v.shape}"
    return sharded.mesh_refusal()


def slower(v: BTHV) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    if reason := limits.unknown_gpu():
        return reason
    time, full = v.shape[1], devices.crossovers(target_device_kind()).chunk_tokens
    return None if time >= full else f"T is {time}, less than a chunk of {full}"


def compute(fused: Callable, call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state of fused(call), each device for its rows and heads.

    q, k, a and b become v's dtype, the others fp32, log-decays such that they can be added up. All sizes are filled up
    with zeros, which change no state, and cut off again.
    """

    def on_device(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
        (_, time, _, keys), values = call.q.shape, call.v.shape[-1]
        call, _ = segments.separated(call)  # padding has queries of 0, and so its outputs are 0
        o, state = fused(MatrixStateCall(*sharded.vary_alike(*_filled(call))))
        return o[:, :time, :, :values], state[:, :, :keys, :values]

    return sharded.per_device(on_device, call)


def _filled(call: MatrixStateCall) -> MatrixStateCall:
    """Return the call in the kernels' dtypes and sizes."""
    # Triton takes half a second to import and is needed only here.
    from pallas_kernels.triton.chunks import CHUNK_TOKENS, STRIP_WIDTH

    wide = next(size for size in KEY_DIMS if size >= call.q.shape[-1])
    state = empty_state(call) if call.state is None else call.state.astype(jnp.float32)
    keys, values = {1: CHUNK_TOKENS, 3: wide}, {1: CHUNK_TOKENS, 3: STRIP_WIDTH}
    decays = keys if call.log_decay.shape[3] > 1 else {1: CHUNK_TOKENS}
    log_decay = jnp.maximum(call.log_decay.astype(jnp.float32), MIN_LOG_DECAY)
    q, k, a, b = jax.tree.map(lambda x: sharded.fill(x.astype(call.v.dtype), keys), (call.q, call.k, call.a, call.b))
    return call._replace(
        q=q,
        k=k,
        v=sharded.fill(call.v, values),
        log_decay=sharded.fill(log_decay, decays),
        beta=None if call.beta is None else sharded.fill(call.beta.astype(jnp.float32), {1: CHUNK_TOKENS}),
        a=a,
        b=b,
        state=sharded.fill(state, {2: wide, 3: STRIP_WIDTH}),
    )

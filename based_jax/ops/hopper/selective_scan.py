"""The selective scan in Hopper kernels, token by token: which calls they take, padding, and gradients.

Kernels: `pallas_kernels/hopper/selective_scan*.py`.
"""

import jax
import jax.numpy as jnp

from based_jax.dims import BTD
from based_jax.ops import segments, sharded
from based_jax.ops.calls import BDN, SelectiveScanCall
from based_jax.ops.hopper import limits

CHANNEL_MULTIPLE = 64
STATE_DIMS = range(8, 33, 8)
TOKEN_MULTIPLE = 8
NO_STEP = -1e30
"""A raw step whose softplus is 0."""


def supports(call: SelectiveScanCall) -> str | None:
    """Return why the kernels cannot run this call, or None; shapes and dtypes are all that they ask for."""
    u, (channels, states) = call.u, call.A.shape
    if u.dtype not in (jnp.bfloat16, jnp.float32):
        return f"u must be bfloat16 or float32, and is {u.dtype}"
    if channels % CHANNEL_MULTIPLE:
        return f"the channels must be a multiple of {CHANNEL_MULTIPLE}, and are {channels}"
    if states not in STATE_DIMS:
        return f"a channel must have {', '.join(map(str, STATE_DIMS))} states, and has {states}"
    given, most = u.size * states, TOKEN_MULTIPLE * limits.MAX_ELEMENTS
    if not 0 < given < most:
        return f"there must be 1 to {most - 1} states of all tokens, and are {given}"
    return limits.refusal()


def compute(call: SelectiveScanCall) -> tuple[BTD, BDN]:
    """Return y and the state after the last token, each device for its rows and all channels."""
    rows = ("batch",)
    names = [() if name in ("A", "bias") else rows for name in call._fields]
    return sharded.per_shard(_on_device, call, names, (rows, rows))


def _on_device(u, dt, A, B, C, state, segment_ids, bias) -> tuple[BTD, BDN]:
    """Run the kernels on a whole number of tiles; tokens of padding have no step, change no state and read none."""
    state = jnp.zeros((u.shape[0], *A.shape), jnp.float32) if state is None else state
    time, offsets, none = u.shape[1], None, 0 if bias is None else NO_STEP
    if segment_ids is not None:
        offsets = jnp.where(segments.begins_later(segment_ids), segments.FORGET_LOG_DECAY, 0.0)
        padding = (segment_ids == 0)[..., None]
        u, dt, C = jnp.where(padding, 0, u), jnp.where(padding, none, dt), jnp.where(padding, 0, C)
    dt = dt.astype(jnp.float32 if bias is None else u.dtype)
    filler = -time % TOKEN_MULTIPLE
    dt = jnp.pad(dt, ((0, 0), (0, filler), (0, 0)), constant_values=none)
    tokens = u, jnp.concatenate([B, C], axis=-1).astype(jnp.float32), offsets
    u, BC, offsets = (None if x is None else sharded.fill(x, {1: TOKEN_MULTIPLE}) for x in tokens)
    A, bias = (None if x is None else x.astype(jnp.float32) for x in (A, bias))
    y, state = _fused(*sharded.vary_alike(u, dt, A, BC, state, offsets, bias))
    return y[:, :time], state


@jax.custom_vjp
def _fused(u, dt, A, BC, state, offsets, bias):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import selective_scan as kernels

    return tuple(sharded.launch(kernels.forward, u, dt, A, BC, state, offsets, bias, with_starts=False))


def _fused_fwd(u, dt, A, BC, state, offsets, bias):
    from pallas_kernels.hopper import selective_scan as kernels

    y, last, starts = sharded.launch(kernels.forward, u, dt, A, BC, state, offsets, bias, with_starts=True)
    return (y, last), (u, dt, A, BC, starts, offsets, bias)


def _fused_bwd(saved, gradients):
    from pallas_kernels.hopper import selective_scan_backward as kernels

    *arrays, offsets, bias = saved
    du, ddt, dA, dBC, dstate, *dbias = sharded.launch(kernels.backward, *arrays, *gradients, offsets, bias)
    return du, ddt, dA, dBC, dstate, None, dbias[0] if dbias else None


_fused.defvjp(_fused_fwd, _fused_bwd)

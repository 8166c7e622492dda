"""RWKV-4's average of values in Hopper kernels, token by token: which calls they take, padding, and gradients.

Kernels: `pallas_kernels/hopper/wkv4*.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from based_jax.dims import BT, BTD
from based_jax.ops import segments, sharded
from based_jax.ops.calls import Wkv4Call, WkvState
from based_jax.ops.hopper import limits

CHANNEL_MULTIPLE, TOKEN_MULTIPLE = 128, 16
"""Others are filled up with zeros."""


def supports(call: Wkv4Call) -> str | None:
    """Return why the kernels cannot run this call, or None; shapes and dtypes are all that they ask for."""
    for name, x in (("k", call.k), ("v", call.v)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, and is {x.dtype}"
    batch, time, channels = call.k.shape
    elements = batch * time * -(-channels // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
    if not 0 < elements < limits.MAX_ELEMENTS:
        return f"there must be 1 to {limits.MAX_ELEMENTS - 1} values, and are {elements}"
    return limits.refusal()


def compute(call: Wkv4Call) -> tuple[BTD, WkvState]:
    """Return wkv and the state after the last token, each device for its rows and channels."""
    return sharded.per_device(_on_device, call)


def _on_device(call: Wkv4Call) -> tuple[BTD, WkvState]:
    """Run the kernels on whole tiles of tokens and strips of channels."""
    _, time, channels = call.k.shape
    tokens = (sharded.fill(x, {1: TOKEN_MULTIPLE, 2: CHANNEL_MULTIPLE}) for x in (call.k, call.v))
    rates = (sharded.fill(x.astype(jnp.float32), {0: CHANNEL_MULTIPLE}) for x in (call.log_decay, call.bonus))
    state = sharded.fill(jnp.stack(call.state, axis=1), {2: CHANNEL_MULTIPLE})
    marks = _marks(call.k, call.segment_ids)
    wkv, last = _fused(*sharded.vary_alike(*tokens, *rates, state, marks))
    return wkv[:, :time, :channels], WkvState(*jnp.moveaxis(last[..., :channels], 1, 0))


def _marks(k: BTD, segment_ids: BT | None) -> Int[Array, "B _"] | None:
    """Return the kernels' mark of each token, that of padding for those filled up; None where they need none."""
    # Pallas' GPU modules take half a second to import and are needed only here and below.
    from pallas_kernels.hopper.wkv4 import BEGINS, PADDING

    if segment_ids is None:
        if k.shape[1] % TOKEN_MULTIPLE == 0:
            return None
        segment_ids = jnp.ones(k.shape[:2], jnp.int32)
    ids = sharded.fill(segment_ids, {1: TOKEN_MULTIPLE})
    marks = jnp.where(ids == 0, PADDING, jnp.where(segments.begins_later(ids), BEGINS, 0))
    return marks.astype(jnp.int32)


@jax.custom_vjp
def _fused(k, v, decay, bonus, state, marks):
    from pallas_kernels.hopper import wkv4 as kernels

    return tuple(sharded.launch(kernels.forward, k, v, decay, bonus, state, marks, with_starts=False))


def _fused_fwd(k, v, decay, bonus, state, marks):
    from pallas_kernels.hopper import wkv4 as kernels

    wkv, last, starts = sharded.launch(kernels.forward, k, v, decay, bonus, state, marks, with_starts=True)
    return (wkv, last), (k, v, decay, bonus, state, last, starts, marks)


def _fused_bwd(saved, gradients):
    """Take the maximum of the last state as a constant: it scales the sums, and what reads it reads both."""
    from pallas_kernels.hopper import wkv4_backward as kernels

    k, v, decay, bonus, state, last, starts, marks = saved
    dwkv, dlast = gradients
    dlast = dlast.at[:, 2].set(-last[:, 2])
    dk, dv, rows = sharded.launch(kernels.backward, k, v, decay, bonus, starts, dwkv, dlast, marks)
    num, den, exponent, ddecay, dbonus = (rows[:, i] for i in range(5))
    scale = jnp.exp(exponent + state[:, 2])
    dnum, dden = num * scale, den * scale
    dstate = jnp.stack([dnum, dden, state[:, 0] * dnum + state[:, 1] * dden], axis=1)
    return dk, dv, ddecay.sum(axis=0), dbonus.sum(axis=0), dstate, None


_fused.defvjp(_fused_fwd, _fused_bwd)

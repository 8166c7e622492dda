"""RWKV-4's average of values in Hopper kernels, token by token: which calls they take, padding, and gradients.

Where rows and channels are few, time is cut: pieces of it run beside each other, first for the state that each leaves
from none, then from the one before it, which those compose. Kernels: `pallas_kernels/hopper/wkv4*.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from based_jax.dims import BT, BTD
from based_jax.ops import segments, sharded
from based_jax.ops.calls import LOG_OF_NOTHING, Wkv4Call, WkvState
from based_jax.ops.hopper import limits

CHANNEL_MULTIPLE, TOKEN_MULTIPLE = 128, 16
"""Others are filled up with zeros."""
MIN_IDLE_RATIO = 4
"""Multiprocessors for each strip of a row from which on time is cut, since all is computed twice then."""
MIN_PIECE_TOKENS = 256


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


def number_of_pieces(blocks: int, time: int) -> int:
    """Return into how many pieces time is cut: where most of the chip would be idle, so many that it has two rounds."""
    if blocks * MIN_IDLE_RATIO > limits.multiprocessors():
        return 1
    most = min(2 * limits.multiprocessors() // blocks, max(1, time // MIN_PIECE_TOKENS))
    return 1 << most.bit_length() - 1


def _on_device(call: Wkv4Call) -> tuple[BTD, WkvState]:
    """Run the kernels on whole tiles of tokens and strips of channels."""
    assert call.state is not None
    batch, time, channels = call.k.shape
    pieces = number_of_pieces(batch * -(-channels // CHANNEL_MULTIPLE), time)
    whole = {1: TOKEN_MULTIPLE * pieces, 2: CHANNEL_MULTIPLE}
    k, v = (sharded.fill(x, whole) for x in (call.k, call.v))
    decay, bonus = (sharded.fill(x.astype(jnp.float32), {0: CHANNEL_MULTIPLE}) for x in (call.log_decay, call.bonus))
    state = sharded.fill(jnp.stack(call.state, axis=1), {2: CHANNEL_MULTIPLE})
    marks = _marks(call.segment_ids, batch, time, k.shape[1])
    k, v, decay, bonus, state, marks = sharded.vary_alike(k, v, decay, bonus, state, marks)
    if pieces > 1:
        k, v, marks = _cut(k, pieces), _cut(v, pieces), None if marks is None else _cut(marks, pieces)
        state = _before_pieces(k, v, decay, bonus, state, marks)
    wkv, last = _fused(k, v, decay, bonus, state, marks)
    wkv, last = wkv.reshape(batch, -1, wkv.shape[2]), last.reshape(batch, pieces, *last.shape[1:])[:, -1]
    return wkv[:, :time, :channels], WkvState(*jnp.moveaxis(last[..., :channels], 1, 0))


def _cut(x: Array, pieces: int) -> Array:
    """Return pieces of time as rows."""
    return x.reshape(x.shape[0] * pieces, -1, *x.shape[2:])


def _before_pieces(k, v, decay, bonus, state, marks) -> Float[Array, "_ 3 D"]:
    """Return the state before each piece, rows of k, from those before all; rows of those have as many pieces each."""
    rows, time, channels = k.shape
    nothing = jnp.stack(WkvState.empty(rows, channels), axis=1)
    own = _fused(*sharded.vary_alike(k, v, decay, bonus, nothing, marks))[1]

    def after_first(first: Array, others: Array) -> Array:
        return jnp.concatenate([first[:, None], others.reshape(len(state), -1, *others.shape[1:])[:, :-1]], axis=1)

    passed = jnp.broadcast_to(_log_decay(decay, marks, time), (rows, channels))
    decays = after_first(jnp.zeros_like(state[:, 0]), passed)
    states = WkvState(*jnp.moveaxis(after_first(state, own), 2, 0))
    distance, pieces = 1, rows // len(state)
    while distance < pieces:
        padding = ((0, 0), (distance, 0), (0, 0))
        num, den, top = (x[:, :-distance] for x in states)
        top = jnp.pad(top, padding, constant_values=LOG_OF_NOTHING)
        states = WkvState(jnp.pad(num, padding), jnp.pad(den, padding), top).then(decays, states)
        decays = decays + jnp.pad(decays[:, :-distance], padding)
        distance *= 2
    return jnp.stack(states, axis=2).reshape(rows, 3, channels)


def _log_decay(decay, marks, time: int) -> Float[Array, "_ D"]:
    """Return the log-decay of a state over rows of tokens; none is left where a document begins."""
    # Pallas' GPU modules take half a second to import and are needed only here and below.
    from pallas_kernels.hopper.wkv4 import BEGINS, PADDING

    if marks is None:
        return decay[None] * time
    begins = jnp.any(marks == BEGINS, axis=1, keepdims=True)
    tokens = jnp.sum(marks != PADDING, axis=1, keepdims=True)
    return decay[None] * tokens + jnp.where(begins, segments.FORGET_LOG_DECAY, 0.0)


def _marks(segment_ids: BT | None, rows: int, time: int, whole: int) -> Int[Array, "B _"] | None:
    """Return the kernels' mark of each token, padding for those filled up to `whole`; None where they need none."""
    from pallas_kernels.hopper.wkv4 import BEGINS, PADDING

    if segment_ids is None and time == whole:
        return None
    if segment_ids is None:
        return jnp.broadcast_to(jnp.where(jnp.arange(whole) < time, 0, PADDING).astype(jnp.int32), (rows, whole))
    ids = jnp.pad(segment_ids, ((0, 0), (0, whole - time)))
    return jnp.where(ids == 0, PADDING, jnp.where(segments.begins_later(ids), BEGINS, 0)).astype(jnp.int32)


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

"""Matrix states by chunks of tokens, in Triton kernels: what they ask for, and how arrays are filled up for them.

Which kernels take a call depends on its decays: `ops/one_decay.py` or `ops/channel_decays.py`.
"""

import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHKV, BT, BTHK, BTHV
from based_jax.ops import hopper, recurrence
from based_jax.ops.dispatch import target_device_kind

KEYS = (16, 32, 64, 128)
"""Sizes of keys; others are filled up with zeros."""
FULL = 64
"""Tokens of a chunk. Fewer take as long; `auto` leaves them to others."""
WEAKEST = -128.0
"""A log-decay that leaves nothing in fp32. Sums of it over a chunk are still exact to 1e-3."""


def supports(v: BTHV, keys: int) -> str | None:
    """Return why no kernels can run a call with keys of that size, or None."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"jax {jax.__version__} has no Triton backend of Pallas"
    if v.dtype != jnp.bfloat16:
        return f"v must be bfloat16, and is {v.dtype}"
    if keys > KEYS[-1]:
        return f"K must be at most {KEYS[-1]}, and is {keys}"
    if not v.size * keys:
        return f"no dimension may be empty, and K is {keys}, v {v.shape}"
    return hopper.mesh_refusal()


def slower(v: BTHV) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    kind, time = target_device_kind(), v.shape[1]
    if not hopper.DEVICES.search(kind):
        return f"it has been timed on Hopper GPUs alone, and this is {kind}"
    return None if time >= FULL else f"T is {time}, less than a chunk of {FULL}"


def run(
    fused: Callable,
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_decay: Float[Array, "B T H #K"],
    ab: Sequence[BTHK],
    rates: Sequence[Float[Array, "B T H"]],
    state: BHKV,
    segment_ids: BT | None,
) -> tuple[BTHV, BHKV]:
    """Return o and the state of fused(q, k, v, log_decay, state, *ab, *rates), each device for its rows and heads.

    q, k, a and b become v's dtype, the others fp32, log-decays such that they can be added up. All sizes are filled up
    with zeros, which change no state, and cut off again.
    """
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels import split
    from pallas_kernels.triton.chunks import CHUNK, WIDTH

    time, (*_, keys, values) = q.shape[1], state.shape
    wide, counts = next(size for size in KEYS if size >= keys), (len(ab), len(rates))

    def on_device(q, k, v, log_decay, *rest) -> tuple[BTHV, BHKV]:
        ab, rates, [state, segment_ids] = split(rest, *counts)
        q, k, v, log_decay, ab, padding = recurrence.separated(q, k, v, log_decay, ab, segment_ids)
        q, k, *ab = (hopper.fill(x.astype(v.dtype), {1: CHUNK, 3: wide}) for x in (q, k, *ab))
        log_decay = jnp.maximum(log_decay.astype(jnp.float32), WEAKEST)
        log_decay = hopper.fill(log_decay, {1: CHUNK} | ({3: wide} if log_decay.shape[3] > 1 else {}))
        rates = [hopper.fill(x.astype(jnp.float32), {1: CHUNK}) for x in rates]
        v, state = hopper.fill(v, {1: CHUNK, 3: WIDTH}), hopper.fill(state.astype(jnp.float32), {2: wide, 3: WIDTH})
        o, state = fused(*hopper.vary_alike(q, k, v, log_decay, state, *ab, *rates))
        o, state = o[:, :time, :, :values], state[:, :, :keys, :values]
        return (o if padding is None else jnp.where(padding, 0, o)), state

    return hopper.per_head(on_device, (q, k, v, log_decay, *ab, *rates), state, segment_ids)

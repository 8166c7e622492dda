"""Matrix states by chunks of tokens, in Triton kernels: what they ask for, and how arrays are filled up for them.

Which kernels take a call depends on its decays: `ops/one_decay.py` or `ops/channel_decays.py`.
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHKV, BTHK, BTHV
from based_jax.ops import hopper
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


def bounded(log_decay: Float[Array, "B T H #K"]) -> Float[Array, "B T H #K"]:
    """Return fp32 log-decays that can be added up."""
    return jnp.maximum(log_decay.astype(jnp.float32), WEAKEST)


def run(
    fused: Callable, q: BTHK, k: BTHK, v: BTHV, log_decay: Float[Array, "B T H *K"], state: BHKV, *others: Array
) -> tuple[BTHV, BHKV]:
    """Return o and the state of fused(q, k, v, log_decay, state, *others).

    q and k become v's dtype. All sizes are filled up with zeros, which change no state, and cut off again.
    """
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.chunks_triton import CHUNK, WIDTH

    time, (*_, keys, values) = q.shape[1], state.shape
    wide = next(size for size in KEYS if size >= keys)
    q, k, log_decay, *rest = (
        hopper.fill(x, {1: CHUNK, 3: wide}) for x in (q.astype(v.dtype), k.astype(v.dtype), log_decay, *others)
    )
    v, state = hopper.fill(v, {1: CHUNK, 3: WIDTH}), hopper.fill(state.astype(jnp.float32), {2: wide, 3: WIDTH})
    o, state = fused(*hopper.vary_alike(q, k, v, log_decay, state, *rest))
    return o[:, :time, :, :values], state[:, :, :keys, :values]


def cut(x: Float[Array, "B T *H"], size: int) -> Float[Array, "B N C *H"]:
    """Cut time into chunks."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])

"""Gated linear attention and the delta rule with one decay a head, by chunks on tensor cores, in Triton kernels.

One decay makes the weights between the tokens of a chunk a matrix that all channels share. The kernels and their
equations are in `pallas_kernels/one_decay_triton.py`; products are of bf16, sums and the state fp32.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHKV, BT, BTHK, BTHV
from based_jax.ops import hopper, segments
from based_jax.ops.dispatch import target_device_kind

KEYS = (16, 32, 64, 128)
"""Sizes of keys; others are filled up with zeros."""
UNTIMED = "it has not been timed with a decay for each channel"
FULL = 64
"""Tokens of a chunk. Fewer take as long; `auto` leaves them to kernels that go token by token."""
WEAKEST = -128.0
"""A log-decay that leaves nothing in fp32. Sums of it over a chunk are still exact to 1e-3."""


def supports(v: BTHV, keys: int) -> str | None:
    """Return why no kernels by chunks can run a call with keys of that size, or None."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"jax {jax.__version__} has no Triton backend of Pallas"
    if v.dtype != jnp.bfloat16:
        return f"v must be bfloat16, and is {v.dtype}"
    if keys > KEYS[-1]:
        return f"K must be at most {KEYS[-1]}, and is {keys}"
    if not v.size * keys:
        return f"no dimension may be empty, and K is {keys}, v {v.shape}"
    return hopper.mesh_refusal()


def slower(v: BTHV, decays: int = 1) -> str | None:
    """Return why `auto` leaves a call with so many decays a head to others, or None."""
    if decays > 1:
        return UNTIMED
    kind, time = target_device_kind(), v.shape[1]
    if not hopper.DEVICES.search(kind):
        return f"it has been timed on Hopper GPUs alone, and this is {kind}"
    return None if time >= FULL else f"T is {time}, less than a chunk of {FULL}"


def one_decay(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_decay: Float[Array, "B T H 1"],
    beta: Float[Array, "B T H"] | None,
    scale: float,
    state: BHKV,
    segment_ids: BT | None,
) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads.

    Args:
      beta: the rates of the delta rule, or None for gated linear attention.
    """
    tokens, states = ("batch", None, "heads"), ("batch", "heads")

    def on_device(*arguments) -> tuple[BTHV, BHKV]:
        return _on_device(scale, *arguments)

    arguments = q, k, v, log_decay[..., 0], beta, state, segment_ids
    return hopper.per_shard(on_device, arguments, (*(tokens,) * 5, states, ("batch",)), (tokens, states))


def _on_device(scale, q, k, v, log_decay, beta, state, segment_ids) -> tuple[BTHV, BHKV]:
    """Fill all sizes up with zeros, which change no state, and cut them off again."""
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.chunks_triton import CHUNK, WIDTH

    time, (*_, keys, values) = q.shape[1], state.shape
    padding, log_decay = None, jnp.maximum(log_decay.astype(jnp.float32), WEAKEST)
    rates = [] if beta is None else [beta.astype(jnp.float32)]
    if segment_ids is not None:
        padding, begins = (x[..., None] for x in (segment_ids == 0, segments.begins_later(segment_ids)))
        q, k, v = (jnp.where(padding[..., None], 0, x) for x in (q, k, v))
        log_decay = jnp.where(begins, WEAKEST, jnp.where(padding, 0, log_decay))
        rates = [jnp.where(padding, 0, x) for x in rates]
    wide = next(size for size in KEYS if size >= keys)
    q, k = (hopper.fill(x.astype(v.dtype), {1: CHUNK, 3: wide}) for x in (q, k))
    v, state = hopper.fill(v, {1: CHUNK, 3: WIDTH}), hopper.fill(state.astype(jnp.float32), {2: wide, 3: WIDTH})
    log_decay, *rates = (hopper.fill(x, {1: CHUNK}) for x in (log_decay, *rates))
    o, state = _fused(scale, *hopper.vary_alike(q, k, v, log_decay, state, *rates))
    o = o[:, :time, :, :values]
    return (o if padding is None else jnp.where(padding[..., None], 0, o)), state[:, :, :keys, :values]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(scale, q, k, v, log_decay, state, *beta):
    return _forward(scale, q, k, v, log_decay, state, *beta, with_starts=False)[0]


def _forward(scale, q, k, v, log_decay, state, *beta, with_starts: bool):
    from pallas_kernels import one_decay_triton as kernels

    log_decay = jax.lax.optimization_barrier(log_decay)  # XLA would fold the sums of a constant, for seconds
    c = jnp.cumsum(by_chunks(log_decay, kernels.CHUNK), axis=2).reshape(log_decay.shape)
    delta = kernels.Delta(beta[0], kernels.inverses(k, c, beta[0])) if beta else ()
    o, last, *starts = kernels.forward(q, k, v, c, state, delta, scale=scale, with_starts=with_starts)
    return (o, last), (q, k, v, c, delta, *starts)


def by_chunks(x: Float[Array, "B T *H"], size: int) -> Float[Array, "B N C *H"]:
    """Cut time into chunks."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _fused_fwd(scale, *arguments):
    return _forward(scale, *arguments, with_starts=True)


def _fused_bwd(scale, saved, gradients):
    from pallas_kernels import one_decay_triton as kernels

    q, k, v, c, delta, starts = saved
    do, dlast = gradients
    y, ends, dstate = kernels.reverse(q, k, c, do, dlast, delta, scale=scale)
    dq, dk, dc, *more = kernels.gradients(q, k, v, c, starts, do, y, ends, delta, scale=scale)
    dv, *dbeta = more or [y]
    dlog_decay = jax.lax.cumsum(by_chunks(dc, kernels.CHUNK), axis=2, reverse=True).reshape(dc.shape)
    return dq, dk, dv, dlog_decay, dstate, *dbeta


_fused.defvjp(_fused_fwd, _fused_bwd)

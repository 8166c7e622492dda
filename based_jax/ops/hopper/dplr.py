"""A diagonal plus low rank transition (RWKV-7) through the Mosaic GPU kernels by chunks: the call and its gradients.

q, k, a and b are filled up with zeros to 64 channels, v to a multiple of 64, which changes no state. Products are of
bf16, sums and the state fp32. The backward pass saves what tokens are to each other, queries and keys with their
decays, what tokens read of the states before them, and the state before every chunk. Kernels:
`pallas_kernels/hopper/dplr*.py`.
"""

import functools

import jax
import jax.numpy as jnp

from based_jax.dims import BHKV, BTHV
from based_jax.ops import segments, sharded
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.decays import MIN_LOG_DECAY, empty_state
from based_jax.ops.hopper import limits
from based_jax.ops.hopper.delta_rule_channels import two_parts

KEYS = VALUE_MULTIPLE = 64
"""Channels of keys, and what those of values are filled up to a multiple of."""
LOWEST_LOG_DECAY = -40.0
"""A log-decay that leaves 4e-18, far below the last digit of fp32.

What a token reads of the state before it decays is made of the decayed one, times exp(-log_decay): a number in bf16.
"""


def supports(call: MatrixStateCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return limits.matrix_state_refusal(call, KEYS)


def slower(_call: MatrixStateCall) -> str:
    """Return why `auto` leaves a call to others."""
    return "forward the kernels are 3 % faster than those in Triton, in both passes not at all"


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return sharded.per_device(_any_sizes, call)


def _any_sizes(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return what `compute` does, of one shard."""
    (_, time, _, keys), values = call.q.shape, call.v.shape[-1]
    log_decay = jnp.maximum(jnp.broadcast_to(call.log_decay, call.q.shape).astype(jnp.float32), LOWEST_LOG_DECAY)
    call, _ = segments.separated(call._replace(log_decay=log_decay))  # padding's queries and so its outputs are 0
    of_keys, of_values = ({1: limits.CHUNK_TOKENS} | x for x in ({3: KEYS}, {3: VALUE_MULTIPLE}))
    assert call.a is not None and call.b is not None, "a low rank has both"
    state = empty_state(call) if call.state is None else call.state.astype(jnp.float32)
    o, state = _dplr(
        call.scale,
        *sharded.vary_alike(
            *(sharded.fill(x.astype(call.v.dtype), of_keys) for x in (call.q, call.k)),
            sharded.fill(call.v, of_values),
            sharded.fill(jnp.maximum(call.log_decay, MIN_LOG_DECAY), of_keys),
            *(sharded.fill(x, of_keys) for x in (call.a, call.b)),
            sharded.fill(state, {2: KEYS, 3: VALUE_MULTIPLE}),
        ),
    )
    return o[:, :time, :, :values], state[:, :, :keys, :values]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dplr(scale, q, k, v, log_decay, a, b, state):
    return _forward(scale, q, k, v, log_decay, a, b, state, with_starts=False)[0]


def _forward(scale, q, k, v, log_decay, a, b, state, *, with_starts: bool):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import dplr as kernels
    from pallas_kernels.hopper import dplr_pairs

    high, low = two_parts(log_decay)
    given = q, (a * _undone(log_decay)).astype(v.dtype), k, b.astype(v.dtype), high, low
    pairs = functools.partial(dplr_pairs.pairs, scale=scale, blocks=limits.multiprocessors())
    *found, kept = sharded.launch(pairs, *given)
    made = *found[4:], *found[:4]
    walk = functools.partial(kernels.forward, with_starts=with_starts)
    o, last, *rest = sharded.launch(walk, *made, v, kept, jnp.swapaxes(state, 2, 3))
    return (o, jnp.swapaxes(last, 2, 3)), (given, v, log_decay, a, b, made, kept, *rest)


def _dplr_fwd(scale, *arguments):
    return _forward(scale, *arguments, with_starts=True)


def _dplr_bwd(scale, saved, gradients):
    from pallas_kernels.hopper import dplr as kernels
    from pallas_kernels.hopper import dplr_gradients

    (q, decayed_a, k, narrow_b, high, low), v, log_decay, a, b, made, kept, u, starts = saved
    do, dlast = gradients
    dv, dz, ends, dstate = sharded.launch(kernels.reverse, *made, do, kept, jnp.swapaxes(dlast, 2, 3))
    rest = functools.partial(dplr_gradients.gradients, scale=scale, blocks=limits.multiprocessors())
    found = sharded.launch(rest, q, k, decayed_a, narrow_b, high, low, v, u, do, dz, starts, ends)
    dq, dk, da, db, dlog_decay = found
    da = (da.astype(jnp.float32) * _undone(log_decay)).astype(a.dtype)
    return dq, dk, dv, dlog_decay, da, db.astype(b.dtype), jnp.swapaxes(dstate, 2, 3)


_dplr.defvjp(_dplr_fwd, _dplr_bwd)


def _undone(log_decay):
    """Return what undoes a token's decay; none does where a document begins, before which nothing is read."""
    return jnp.exp(-jnp.maximum(log_decay, LOWEST_LOG_DECAY))

"""The delta rule through the Mosaic GPU kernels by chunks: which calls they take, and gradients with one decay a head.

q and k are filled up with zeros to 128 or 256 channels, v to a multiple of 128, which changes no state. Products are of
bf16, sums and the state fp32. The backward pass saves what tokens are to each other, and of every chunk its errors and
the state before it. Kernels: `pallas_kernels/hopper/delta_rule*.py`; those of `delta_rule_channels.py`, which is for a
decay of each channel, have names of their own.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax import devices
from based_jax.dims import BHKV, BTHV
from based_jax.ops import segments, sharded
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.decays import MIN_LOG_DECAY, empty_state
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.hopper import delta_rule_channels, limits

KEY_DIMS, KEY_DIMS_OF_CHANNELS, VALUE_MULTIPLE = (128, 256), (128,), 128
"""Of keys with one decay a head and with one for each channel, and of values."""

BHT = Float[Array, "B H T"]


def supports(call: MatrixStateCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return limits.matrix_state_refusal(call, _key_dims(call)[-1])


def slower(call: MatrixStateCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    (_, time, _, values), keys = call.v.shape, call.q.shape[-1]
    if min(keys, values) <= VALUE_MULTIPLE // 2:
        return f"tiles have {VALUE_MULTIPLE} keys and values, and here are {keys} and {values}"
    full = devices.crossovers(target_device_kind()).chunk_tokens
    return None if time >= full else f"T is {time}, less than a chunk of {full}"


def _key_dims(call: MatrixStateCall) -> tuple[int, ...]:
    return KEY_DIMS if call.log_decay.shape[-1] == 1 else KEY_DIMS_OF_CHANNELS


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return sharded.per_device(_any_sizes, call)


def _any_sizes(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return what `compute` does, of one shard."""
    (_, time, _, keys), values = call.q.shape, call.v.shape[-1]
    call, _ = segments.separated(call)  # padding has queries of 0, and so its outputs are 0
    assert call.beta is not None, "the delta rule has rates"
    wide = next(size for size in _key_dims(call) if size >= keys)
    of_time, of_keys, of_values = ({1: limits.CHUNK_TOKENS} | x for x in ({}, {3: wide}, {3: VALUE_MULTIPLE}))
    state = empty_state(call) if call.state is None else call.state.astype(jnp.float32)
    log_decay = jnp.maximum(call.log_decay.astype(jnp.float32), MIN_LOG_DECAY)
    by_channel = log_decay.shape[-1] > 1
    run = delta_rule_channels.delta_rule if by_channel else _delta_rule
    o, state = run(
        call.scale,
        *sharded.vary_alike(
            *(sharded.fill(x.astype(call.v.dtype), of_keys) for x in (call.q, call.k)),
            sharded.fill(call.v, of_values),
            sharded.fill(log_decay, of_keys) if by_channel else sharded.fill(log_decay[..., 0], of_time),
            sharded.fill(call.beta.astype(jnp.float32), of_time),
            sharded.fill(state, {2: wide, 3: VALUE_MULTIPLE}),
        ),
    )
    return o[:, :time, :, :values], state[:, :, :keys, :values]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(scale, q, k, v, log_decay, beta, state):
    return _forward(scale, q, k, v, log_decay, beta, state, with_starts=False)[0]


def _forward(scale, q, k, v, log_decay, beta, state, *, with_starts: bool):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import delta_rule as kernels
    from pallas_kernels.hopper import delta_rule_pairs

    c, beta = _sums(_by_head(log_decay)), _by_head(beta)
    pairs = functools.partial(delta_rule_pairs.pairs, scale=scale, blocks=limits.multiprocessors())
    p, t = sharded.launch(pairs, q, k, c, beta)
    since, written = _decays(c, beta)
    walk = functools.partial(kernels.forward, scale=scale, with_starts=with_starts)
    o, last, *rest = sharded.launch(walk, q, k, v, p, t, since, written, _transposed(state))
    return (o, _transposed(last)), (q, k, c, beta, p, t, *rest)


def _delta_rule_fwd(scale, *arguments):
    return _forward(scale, *arguments, with_starts=True)


def _delta_rule_bwd(scale, saved, gradients):
    from pallas_kernels.hopper import delta_rule as kernels
    from pallas_kernels.hopper import delta_rule_gradients

    q, k, c, beta, p, t, errors, starts = saved
    do, dlast = gradients
    walk = functools.partial(kernels.reverse, scale=scale)
    dv, ends, dstate = sharded.launch(walk, q, k, do, p, t, *_decays(c, beta), _transposed(dlast))
    rest = functools.partial(delta_rule_gradients.gradients, scale=scale, blocks=limits.multiprocessors())
    dq, dk, *sums = sharded.launch(rest, q, k, errors, do, dv, c, beta, starts, ends)
    dbeta, dc, whole = (x.sum(2) for x in sums)
    dlog_decay = jax.lax.cumsum(_cut(dc), axis=3, reverse=True) + _cut(whole).sum(3, keepdims=True)
    return dq, dk, dv, _by_token(dlog_decay.reshape(dc.shape)), _by_token(dbeta), _transposed(dstate)


_delta_rule.defvjp(_delta_rule_fwd, _delta_rule_bwd)


def _by_head(x: Float[Array, "B T H"]) -> BHT:
    return jnp.moveaxis(x, 1, 2)


def _by_token(x: BHT) -> Float[Array, "B T H"]:
    return jnp.moveaxis(x, 2, 1)


def _transposed(state: Float[Array, "B H _ _"]) -> Float[Array, "B H _ _"]:
    return jnp.swapaxes(state, 2, 3)


def _sums(log_decay: BHT) -> BHT:
    """Return the sums of log-decays from the beginning of each chunk to each token."""
    log_decay = jax.lax.optimization_barrier(log_decay)  # XLA would fold the sums of a constant, for seconds
    return jnp.cumsum(_cut(log_decay), axis=3).reshape(log_decay.shape)


def _decays(c: BHT, beta: BHT) -> tuple[BHT, BHT]:
    """Return what each token sees of the state before its chunk, and what the state after it has of what it writes."""
    cut = _cut(c)
    return jnp.exp(c), jnp.exp(cut[..., -1:] - cut).reshape(c.shape) * beta


def _cut(x: BHT) -> Float[Array, "B H N C"]:
    """Cut time into chunks."""
    return x.reshape(*x.shape[:2], -1, limits.CHUNK_TOKENS)

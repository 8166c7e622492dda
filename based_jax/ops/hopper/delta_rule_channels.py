"""The delta rule with a decay for each channel through the Mosaic GPU kernels by chunks: the call and its gradients.

Log-decays go to the kernels to the base 2, in two parts of bf16. The backward pass saves these, what tokens are to each
other, queries and keys with their decays, and of every chunk its errors and the state before it. Kernels:
`pallas_kernels/hopper/delta_rule_channels*.py`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from based_jax.dims import BHKV, BTHK, BTHV
from based_jax.ops import sharded
from based_jax.ops.calls import BTH
from based_jax.ops.hopper import limits

BF16_EXPONENT_BITS, BF16_MANTISSA_BITS = 8, 7


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta_rule(scale: float, q: BTHK, k: BTHK, v: BTHV, log_decay: BTHK, beta: BTH, state: BHKV) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, given sizes that the kernels take."""
    return _forward(scale, q, k, v, log_decay, beta, state, with_starts=False)[0]


def _forward(scale, q, k, v, log_decay, beta, state, *, with_starts: bool):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import delta_rule_channels as kernels
    from pallas_kernels.hopper import delta_rule_channels_pairs

    high, low = two_parts(log_decay)
    beta = jnp.moveaxis(beta, 1, 2)
    pairs = functools.partial(delta_rule_channels_pairs.pairs, scale=scale, blocks=limits.multiprocessors())
    p, t, *made = sharded.launch(pairs, q, k, high, low, beta)
    *weighed, kept = made
    walk = functools.partial(kernels.forward, with_starts=with_starts)
    o, last, *rest = sharded.launch(walk, *weighed, v, p, t, kept, jnp.swapaxes(state, 2, 3))
    return (o, jnp.swapaxes(last, 2, 3)), (q, k, high, low, beta, p, t, weighed, kept, *rest)


def _fwd(scale, *arguments):
    return _forward(scale, *arguments, with_starts=True)


def _bwd(scale, saved, gradients):
    from pallas_kernels.hopper import delta_rule_channels as kernels
    from pallas_kernels.hopper import delta_rule_channels_gradients

    q, k, high, low, beta, p, t, weighed, kept, errors, starts = saved
    do, dlast = gradients
    dv, ends, dstate = sharded.launch(kernels.reverse, *weighed, do, p, t, kept, jnp.swapaxes(dlast, 2, 3))
    rest = delta_rule_channels_gradients.gradients
    rest = functools.partial(rest, scale=scale, blocks=limits.multiprocessors())
    dq, dk, dg, dbeta = sharded.launch(rest, q, k, high, low, errors, do, dv, beta, starts, ends)
    return dq, dk, dv, dg, jnp.moveaxis(dbeta.sum(2), 1, 2), jnp.swapaxes(dstate, 2, 3)


delta_rule.defvjp(_fwd, _bwd)


def two_parts(log_decay: BTHK) -> tuple[BTHK, BTHK]:
    """Return log-decays to the base 2 as two arrays in bf16 whose sum they are.

    A conversion to bf16 and back XLA may leave out, but not a reduction of the precision.
    """
    log_decay = log_decay * math.log2(math.e)
    high = jax.lax.reduce_precision(log_decay, BF16_EXPONENT_BITS, BF16_MANTISSA_BITS)
    return high.astype(jnp.bfloat16), (log_decay - high).astype(jnp.bfloat16)

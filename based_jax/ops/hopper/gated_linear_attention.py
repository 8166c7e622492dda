"""Gated linear attention in Hopper kernels, token by token (`recurrence.py`)."""

import jax.numpy as jnp

from based_jax import devices
from based_jax.dims import BHKV, BTHV
from based_jax.ops.calls import MatrixStateCall
from based_jax.ops.decays import one_chunk_is_faster
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.hopper import recurrence


def supports(call: MatrixStateCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return recurrence.supports(call)


def slower(call: MatrixStateCall) -> str | None:
    """Return why XLA's products are faster than the kernels, token by token, or None."""
    (_, T, _, K), V = call.k.shape, call.v.shape[-1]
    known = devices.crossovers(target_device_kind())
    if call.log_decay.shape[-1] > 1:
        return None
    if known.chunk_tokens > T and call.v.dtype == jnp.bfloat16:
        return f"one chunk is faster where heads have one decay, and T is {T}, less than {known.chunk_tokens}"
    if known.one_decay_steps_tokens < T:
        return f"products are faster where heads have one decay, and T is {T}, above {known.one_decay_steps_tokens}"
    return one_chunk_is_faster(T, known.one_decay_one_chunk_tokens, K * V)


def compute(call: MatrixStateCall) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return recurrence.compute(call)

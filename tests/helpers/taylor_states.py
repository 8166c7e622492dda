"""Calls of Taylor attention's decode step."""

import jax.numpy as jnp

from based_jax.ops.taylor_decode import initial_state


def arguments_of(B=2, T=1, H=2, K=16, V=64, dtype="bfloat16", **form):
    """Return q, k, v and a state without tokens, which takes 16 at once unless `form` says otherwise."""
    q, v = (jnp.zeros((B, T, H, dim), dtype) for dim in (K, V))
    return q, q, v, initial_state(B, H, K, V, dtype=jnp.dtype(dtype), **{"flush": 16} | form)

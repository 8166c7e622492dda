"""How a sequence is read when it is decoded."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnums=2)
def prefill_then_step(module, x, prefilled):
    """Return outputs (B, T, ...), the first `prefilled` tokens read at once, and the caches then and at the end."""
    y, first = module.prefill(x[:, :prefilled], module.init_cache(*x.shape[:2]))
    last, rest = jax.lax.scan(
        lambda cache, token: module.step(token, cache)[::-1], first, jnp.moveaxis(x[:, prefilled:], 1, 0)
    )
    return jnp.concatenate([y, jnp.moveaxis(rest, 0, 1)], axis=1), first, last


@jax.jit
def in_one_pass(module, x, segment_ids=None):
    """Return outputs (B, T, ...) of the whole sequence."""
    return module(x, segment_ids)

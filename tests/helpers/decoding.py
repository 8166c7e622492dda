"""How a sequence is read when it is decoded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from based_jax.generate.decoder import Decoder, layout_of


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


def random_decoder(config, seed=0, scale=0.5):
    """Return a decoder of Gaussian parameters, for which nothing is compiled; scales of norms are ones."""
    layout, rng = layout_of(config), np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x, layout.shapes)
    for path, leaf in nnx.to_flat_state(params):
        values = np.ones(leaf.shape) if path[-1] == "scale" else scale * rng.standard_normal(leaf.shape)
        leaf.set_value(jnp.asarray(values.astype(leaf.dtype)))
    return Decoder(layout, tuple(jax.tree.leaves(params)))

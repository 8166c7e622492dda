"""Modules of random values, without compiling their initial ones."""

import jax.numpy as jnp
from flax import nnx


def filled(build, rng, scale=1.0):
    """Return the module that `build()` makes, its parameters N(0, scale^2)."""
    module = nnx.eval_shape(build)
    for _, leaf in nnx.to_flat_state(nnx.state(module)):
        leaf.set_value(jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32))
    return module

"""A mixer on a mesh is the mixer on one device."""

import jax
import jax.numpy as jnp
from flax import nnx
from helpers.cases import parametrize_some
from helpers.small_mixers import SMALL

from based_jax import parallel
from based_jax.nn.mixers import MIXERS, make_mixer

B, T, D = 4, 9, 16
ORDINARY = "attention", "taylor", "conv", "hyena", "gla", "mamba2"
"""One of each family; recurrences on a mesh are compared in `ops/test_sequence.py` as well."""


@parametrize_some("kind", MIXERS, ORDINARY)
def test_sharded_equals_unsharded(kind, normal, out_and_grads, close):
    """Rows over 2 devices and parameters by their logical names over 4, gradients included."""
    mixer = make_mixer(kind, D, std=0.2, out_std=0.2, dtype=jnp.float32, rngs=nnx.Rngs(0), **SMALL.get(kind, {}))
    graphdef, params = nnx.split(mixer)
    x, cotangent = normal(B, T, D), normal(B, T, D)
    mesh = parallel.make_mesh({"data": 2, "tensor": 4})
    placed = jax.device_put(params, parallel.shardings(params, mesh))

    def forward(params, x):
        return nnx.merge(graphdef, params)(x)

    sharded = out_and_grads(forward, (placed, jax.device_put(x, parallel.batch_sharding(mesh, x.shape))), cotangent)
    close(sharded, out_and_grads(forward, (params, x), cotangent))

"""A mixer on a mesh, and in lanes, is the mixer on one device, alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers.cases import parametrize_some
from helpers.small_mixers import SMALL

from based_jax import parallel
from based_jax.nn.mixers import MIXERS, make_mixer

B, T, D = 4, 9, 16
ORDINARY = "attention", "taylor", "conv", "hyena", "gla", "mamba2"
"""One of each family; recurrences on a mesh are compared in `ops/test_sequence.py` as well."""


def mixer_of(kind, seed=0):
    return make_mixer(kind, D, std=0.2, out_std=0.2, dtype=jnp.float32, rngs=nnx.Rngs(seed), **SMALL.get(kind, {}))


@parametrize_some("kind", MIXERS, ORDINARY)
def test_vmap_over_parameters_equals_a_loop(kind, normal, close):
    mixers, x = [mixer_of(kind, seed) for seed in range(3)], np.asarray(normal(3, B, T, D))
    graphdef = nnx.graphdef(mixers[0])
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *map(nnx.state, mixers))

    def call(params, x):
        return nnx.merge(graphdef, params)(x)

    alone = jax.jit(call)
    expected = np.stack([alone(nnx.state(mixer), x[i]) for i, mixer in enumerate(mixers)])
    close(jax.jit(jax.vmap(call))(params, x), expected)


@parametrize_some("kind", MIXERS, ORDINARY)
def test_sharded_equals_unsharded(kind, normal, out_and_grads, close):
    """Rows over 2 devices and parameters by their logical names over 4, gradients included."""
    graphdef, params = nnx.split(mixer_of(kind))
    x, cotangent = normal(B, T, D), normal(B, T, D)
    mesh = parallel.make_mesh({"data": 2, "tensor": 4})
    placed = jax.device_put(params, parallel.shardings(params, mesh))

    def forward(params, x):
        return nnx.merge(graphdef, params)(x)

    sharded = out_and_grads(forward, (placed, jax.device_put(x, parallel.batch_sharding(mesh, x.shape))), cotangent)
    close(sharded, out_and_grads(forward, (params, x), cotangent))

"""The cache of tokens that attention and long convolutions keep."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from based_jax import parallel
from based_jax.nn.mixers import make_mixer

COLLECTIVES = r"= \S+ (all-gather|all-to-all|reduce-scatter)\("


@pytest.mark.parametrize("kind", ["attention", "window"])
def test_each_device_writes_its_own_rows_and_heads(kind):
    """A token, of a place of its own in each row, goes to the slots without a cache leaving its device."""
    mesh = parallel.make_mesh({"data": 4, "tensor": 2})
    graphdef, params = nnx.split(make_mixer(kind, 16, num_heads=4, rngs=nnx.Rngs(0)))
    cache = nnx.merge(graphdef, params).init_cache(8, 32)

    def placed(tree):
        axes = ("data", None, "tensor")
        return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*axes[: x.ndim if x.ndim < 3 else 3])), tree)

    def step(params, x, cache):
        return nnx.merge(graphdef, params).step(x, cache)

    x = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, PartitionSpec("data")))
    shardings = placed(cache)
    params, cache = jax.device_put((params, cache), (parallel.shardings(params, mesh), shardings))
    program = jax.jit(step, donate_argnums=2, out_shardings=(x.sharding, shardings)).lower(params, x, cache).compile()
    assert re.findall(COLLECTIVES, program.as_text()) == []


@pytest.mark.long
def test_a_document_with_an_id_of_64_bits_goes_on(normal, close):
    @jax.jit
    def in_two_and_in_one(x, ids):
        mixer = make_mixer("conv", 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
        first, cache = mixer.prefill(x[:, :2], mixer.init_cache(1, 4), ids)
        second, _ = mixer.prefill(x[:, 2:], cache, ids)
        return jnp.concatenate([first, second], axis=1), mixer(x)

    x = normal(1, 4, 8)
    with jax.enable_x64(True):
        for id in (2**32 + 1, 2**63 - 1):
            close(*in_two_and_in_one(x, jnp.full((1, 2), id, jnp.int64)), floor=1e-9)

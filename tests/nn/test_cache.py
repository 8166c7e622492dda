"""The cache of tokens that attention and long convolutions keep."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from based_jax import parallel
from based_jax.nn.cache import SinkCache, TokenCache, TriedTokens
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


@pytest.mark.parametrize("sinks", [None, 2])
def test_the_first_tokens_of_rows_are_written_as_one_after_the_other(sinks, rng):
    """Rows of which none, some and all stay, before the ring is full and long after."""
    B, S, T, length = 5, 7, 6, np.asarray([0, 3, 6, 40, 41], np.int32)
    kept = np.asarray([T, 0, 3, T, 1], np.int32)
    old, new = rng.integers(100, size=(B, S, 2)), 100 + rng.integers(100, size=(B, T, 2))
    cache = TokenCache(old, length) if sinks is None else SinkCache(old, length, sinks)
    found = jax.jit(lambda *given: TriedTokens(*given[:2]).kept(given[2]))(new, cache, kept)
    for row in range(B):
        one = dataclasses.replace(
            cache, tokens=jnp.asarray(old[row : row + 1]), length=jnp.asarray(length[row : row + 1])
        )
        for token in new[row, : kept[row]]:
            one = one.append(jnp.asarray(token[None]))
        np.testing.assert_array_equal(found.tokens[row], one.tokens[0])
        assert found.length[row] == one.length[0]


def test_where_tokens_go_is_found_once_and_not_for_each_channel():
    """A program that writes tokens that were tried, and prompts, reads slots that are there."""

    def write(cache, tokens, ids):
        return cache.extend(tokens, ids), TriedTokens(tokens, cache).kept(ids[:, 0])

    cache = TokenCache.empty(jnp.zeros((2, 9, 3)))
    text = jax.jit(write).lower(cache, jnp.zeros((2, 4, 3)), jnp.ones((2, 4), jnp.int32)).as_text()
    assert text.count("optimization_barrier") == 2

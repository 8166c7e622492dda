"""Functions under a mesh: each device runs them on its part of the arrays."""

import jax
import jax.numpy as jnp
import pytest
from helpers.scans import SCANS

from based_jax import parallel
from based_jax.ops import sharded
from based_jax.ops.dimensions import DIMENSIONS

TOKENS = "batch", None, "heads"


def _scaled(x, scale, ids):
    return x * scale[None, None, None] * (1 if ids is None else ids[:, :, None, None])


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"tensor": 8}])
@pytest.mark.parametrize("with_ids", [False, True])
def test_shards_are_parts_of_the_whole(normal, close, sizes, with_ids):
    x, scale, ids = normal(8, 3, 8, 5), normal(5), jnp.ones((8, 3), jnp.int32) if with_ids else None

    def call(x, scale):
        return sharded.per_shard(_scaled, (x, scale, ids), (TOKENS, (), ("batch",)), (TOKENS,))

    def both(x, scale):
        y, pull = jax.vjp(call, x, scale)
        return y, pull(x)

    expected = both(x, scale)
    with jax.set_mesh(parallel.make_mesh(sizes)):
        close(jax.jit(both)(x, scale), expected)


def test_a_device_sees_its_rows_and_heads_alone(normal):
    shapes = []

    def note(x):
        shapes.append(x.shape)
        return x

    for shape, sizes, seen in (
        ((4, 3, 6, 5), {"data": 2, "fsdp": 2, "tensor": 2}, (1, 3, 3, 5)),
        ((3, 3, 6, 5), {"data": 2, "fsdp": 2, "tensor": 2}, (3, 3, 3, 5)),  # what does not divide stays whole
        ((4, 3, 5, 5), {"data": 4, "tensor": 2}, (1, 3, 5, 5)),
    ):
        with jax.set_mesh(parallel.make_mesh(sizes)):
            out = jax.jit(lambda x: sharded.per_shard(note, (x,), (TOKENS,), (TOKENS,)))(normal(*shape))
        assert out.shape == shape and shapes.pop() == seen


@pytest.mark.parametrize("call", DIMENSIONS, ids=lambda call: call.__name__)
def test_every_array_of_a_call_has_names(call):
    """Only sizes and switches are no arrays; an array without names would be one that a device takes from outside."""
    sizes = {name for name, default in call._field_defaults.items() if default is not None} | {"window", "head_dim"}
    named = {*DIMENSIONS[call].arguments} | {"segment_ids"} & {*call._fields}
    assert named == set(call._fields) - sizes


def within_shard_map(call):
    """Return a call that each of two devices runs on its rows, by hand and not by `per_shard`."""
    mesh = parallel.make_mesh({"data": 2}, jax.devices()[:2])
    return jax.shard_map(call, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))


@pytest.mark.parametrize("impl", ["xla_steps", "xla_chunks"])
@pytest.mark.parametrize("name", SCANS)
def test_a_scan_can_be_called_within_shard_map(name, impl):
    """Over several chunks, from no state and from one, with documents and without: the carry varies as tokens do."""
    x, ids = jnp.zeros((2, 150, 2, 4)), jnp.ones((2, 150), jnp.int32)

    def call(x, ids):
        _, state = SCANS[name](x, impl=impl)
        return SCANS[name](x, state=state, segment_ids=ids, impl=impl)

    jax.eval_shape(lambda x, ids: within_shard_map(lambda given: call(*given))((x, ids)), x, ids)


def test_a_scan_within_shard_map_is_that_of_the_whole(normal, close):
    x, call = normal(4, 80, 2, 4), SCANS["gated_linear_attention"]

    def both(run, x):
        y, pull = jax.vjp(run, x)
        return y, pull(y)

    close(jax.jit(lambda x: both(within_shard_map(call), x))(x), jax.jit(lambda x: both(call, x))(x))

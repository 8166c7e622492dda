"""Which mesh axes divide which dimensions, and that each device then holds its share and no other's."""

import math

import jax
import numpy as np
import pytest
from helpers.hlo import Program

from based_jax import parallel, placement
from based_jax.placement import Wish, place

SIZES = {"data": 4, "fsdp": 64, "tensor": 2}


@pytest.mark.parametrize(
    ("shape", "wishes", "parts"),
    [
        ((64, 9), [Wish("fsdp", [0])], ((("fsdp", 64),), ())),
        ((1680, 9216), [Wish("fsdp", [0], [0, 1])], ((), (("fsdp", 64),))),
        ((1680, 5040), [Wish("fsdp", [0], [0, 1])], ((("fsdp", 16),), (("fsdp", 4),))),
        (
            (1680, 5040),
            [Wish("tensor", [1]), Wish("fsdp", [0], [0, 1])],
            ((("fsdp", 16),), (("tensor", 2), ("fsdp", 4))),
        ),
        (
            (128, 8),
            [Wish("tensor", [1]), Wish("fsdp", [0]), Wish("data", [0], [1])],
            ((("fsdp", 64),), (("tensor", 2), ("data", 4))),
        ),
        ((256, 8), [Wish("fsdp", [0]), Wish("data", [0], [1])], ((("fsdp", 64), ("data", 4)), ())),
    ],
)
def test_an_axis_goes_where_it_divides(shape, wishes, parts):
    found = place(shape, SIZES, wishes)
    assert found.parts == parts
    assert set(found.whole.values()) == {1}


@pytest.mark.parametrize(
    ("shape", "wish", "parts", "whole"),
    [
        ((1680,), Wish("fsdp", [0]), ((),), 64),
        ((1680,), Wish("fsdp", [0], [0]), ((("fsdp", 16),),), 4),
        ((3, 5), Wish("fsdp", [0], [0, 1]), ((), ()), 64),
    ],
)
def test_what_is_left_of_an_axis_holds_the_same(shape, wish, parts, whole):
    found = place(shape, SIZES, [wish])
    assert (found.parts, found.whole) == (parts, {"fsdp": whole})


@pytest.mark.parametrize("shape", [(12, 8), (12, 10), (6, 4), (20, 3)])
def test_devices_hold_equal_parts_that_make_up_the_array(shape):
    """Whether an axis divides one dimension or two, alone or beside another; arrays come and go whole."""
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    found = place(shape, mesh.shape, [Wish("tensor", [1]), Wish("fsdp", [0], [0, 1])])
    sharding = found.sharding(mesh)
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    placed = jax.device_put(x, sharding)
    np.testing.assert_array_equal(placed, x)
    [size] = {shard.data.size for shard in placed.addressable_shards}
    assert size * mesh.size == x.size * math.prod(found.whole.values())
    for axis, devices in mesh.shape.items():
        assert placement.parts_along(sharding, axis) * found.whole.get(axis, 1) == devices
    assert list(sharding.mesh.devices.flat) == list(mesh.devices.flat)


def test_rows_are_computed_where_they_lie():
    """Each device computes one row, two of them zeros, and the result is that of one device."""
    x = np.random.default_rng(0).normal(size=(6, 8, 4)).astype(np.float32)

    def call(rows):
        return placement.by_rows(lambda row: row @ row.mT @ row, rows)

    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor")))
        compiled = jax.jit(call).lower(placed).compile()
        np.testing.assert_allclose(compiled(placed), x @ x.mT @ x, rtol=1e-4, atol=1e-4)
    assert Program(compiled.as_text()).flops() == 2 * (2 * 8 * 8 * 4)

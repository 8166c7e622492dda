"""Calls of Triton kernels as such: lanes, meshes, what is compiled, and the interpreter's checks."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from helpers import triton_interpreter
from helpers.devices import gpus
from jax.sharding import PartitionSpec

from based_jax import parallel
from pallas_kernels.triton.launch import Type, launch, shared_bytes

SIZE = 32


@triton.jit
def scaled_sums(x, y, z, sums, PROGRAMS: tl.constexpr, SIZE: tl.constexpr, SHIFT: tl.constexpr):
    """z = 2 x + y, and the sums of z, of pieces of rows; what is before x and y by SHIFT, or after."""
    program = tl.program_id(0)
    row = program // PROGRAMS
    place = program * SIZE + tl.arange(0, SIZE)
    total = 2 * tl.load(x + place + SHIFT).to(tl.float32) + tl.load(y + row)
    tl.store(z + place, total.to(tl.bfloat16))
    tl.store(sums + program, tl.sum(total, axis=0))


@triton.jit
def read_back(x, z, SIZE: tl.constexpr):
    tl.store(z + tl.program_id(0), tl.load(z) + tl.load(x))


@triton.jit
def all_in_one_place(x, z, SIZE: tl.constexpr):
    tl.store(z, tl.sum(tl.load(x + tl.arange(0, SIZE)), axis=0))


@triton.jit
def doubles(x, untouched, untouched_too, z, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(z + place, 2 * tl.load(x + place))


def call(x, y, shift=0):
    """Return z and sums of (rows, tokens) bf16 and (rows,) fp32."""
    rows, tokens = x.shape
    programs = tokens // SIZE
    types = Type(x.shape, jnp.bfloat16), Type((rows, programs), jnp.float32)
    constants = {"PROGRAMS": programs, "SIZE": SIZE, "SHIFT": shift}
    return launch(scaled_sums, programs, [x, y], types, warps=1, **constants)


def right(x, y):
    total = 2 * x.astype(jnp.float32) + y[:, None]
    return [total.astype(jnp.bfloat16), total.reshape(x.shape[0], -1, SIZE).sum(2)]


@pytest.fixture
def interpreted(monkeypatch):
    triton_interpreter.interpret(monkeypatch, sys.modules[__name__])


def test_lanes_of_lanes_are_rows(normal, interpreted, close):
    x, y = normal(3, 2, 4, 64, dtype="bfloat16"), normal(2, 4)

    def lanes(call):
        return jax.jit(jax.vmap(jax.vmap(call), (0, None)))

    close(lanes(lambda x, y: call(x, y))(x, y), lanes(right)(x, y), tolerance=1e-6)
    alone = [call(x[i, j], y[j]) for i in range(3) for j in range(2)]
    close([jnp.stack(z).reshape(3, 2, *z[0].shape) for z in zip(*alone, strict=True)], lanes(right)(x, y))


def test_none_stands_for_what_a_kernel_does_not_touch(normal, interpreted, close):
    def call(x):
        return launch(doubles, 1, [x, None], [None, Type(x.shape, x.dtype)], warps=1, SIZE=SIZE)

    x = normal(3, 2, SIZE)
    close(jax.vmap(call)(x), [2 * x])


def test_devices_have_their_rows(normal, interpreted, close):
    mesh, rows = parallel.make_mesh({"data": 8}), PartitionSpec("data")
    x, y = normal(16, 64, dtype="bfloat16"), normal(16)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.shard_map(lambda x, y: tuple(call(x, y)), in_specs=rows, out_specs=rows))(x, y)
    close(found, right(x, y))


def test_each_device_runs_its_rows_alone():
    x, y = jnp.zeros((3, 16, 64), jnp.bfloat16), jnp.zeros((3, 16))
    rows = PartitionSpec("data")
    with gpus(shape=(8,)):
        run = jax.vmap(jax.shard_map(lambda x, y: tuple(call(x, y)), in_specs=rows, out_specs=rows))
        lowered = jax.jit(run).trace(x, y).lower(lowering_platforms=("cuda",))
    [kernel] = [line for line in lowered.as_text().splitlines() if "@triton_kernel_call" in line]
    assert kernel.endswith("(tensor<6x64xbf16>, tensor<6xf32>) -> (tensor<6x64xbf16>, tensor<6x2xf32>)")
    assert "scaled_sums" in lowered.as_text(debug_info=True)


@pytest.mark.parametrize(
    "kind, capability, kilobytes",
    [
        ("NVIDIA H200", 90, 227),
        ("NVIDIA A100-SXM4-80GB", 80, 163),
        ("NVIDIA GeForce RTX 3080 Ti", 86, 99),
        ("NVIDIA L40S", 89, 99),
        ("gfx942", None, 64),
    ],
)
def test_it_compiles_for_the_meshs_gpus(kind, capability, kilobytes):
    with gpus(kind):
        assert shared_bytes() == kilobytes << 10
        text = str(jax.make_jaxpr(lambda x, y: call(x, y))(jnp.zeros((2, 64), jnp.bfloat16), jnp.zeros(2)))
    assert f"compute_capability={capability}" in text


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_interpreter_sees_what_is_read_beside_an_array(interpreted, shift):
    with pytest.raises(Exception, match="beside an array"):
        jax.block_until_ready(call(jnp.zeros((2, 64), jnp.bfloat16), jnp.zeros(2), shift))


def test_the_interpreter_sees_what_is_read_before_it_is_written(interpreted):
    with pytest.raises(Exception, match="reads what it has not written"):
        jax.block_until_ready(launch(read_back, 2, [jnp.ones((1, 1))], [Type((1, 2), jnp.float32)], warps=1, SIZE=1))


def test_the_interpreter_sees_two_writers_and_what_none_writes(interpreted):
    x = jnp.ones((1, SIZE))
    with pytest.raises(Exception, match="two programs write one place"):
        jax.block_until_ready(launch(all_in_one_place, 2, [x], [Type((1, 2), x.dtype)], warps=1, SIZE=SIZE))
    [z] = launch(all_in_one_place, 1, [x], [Type((1, 2), x.dtype)], warps=1, SIZE=SIZE)
    np.testing.assert_array_equal(z, [[SIZE, np.nan]])

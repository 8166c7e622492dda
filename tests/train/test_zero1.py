"""ZeRO-1: what each device keeps of the optimizer's state, computes of an update and exchanges for it."""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.hlo import Program

from based_jax import optim, parallel, placement
from based_jax.nn.lm import LMConfig
from based_jax.optim import OptimConfig
from based_jax.train.checkpoint import Checkpoints
from based_jax.train.compile import train_program
from based_jax.train.run import TrainConfig
from based_jax.train.tasks import TASKS

B, T, D, VOCAB = 16, 28, 32, 512
FACTOR_OF_T = 7
LARGE = 1024
"""Bytes from which on a parameter is large here, so that a kernel is and a norm's scale is not."""
MODEL = LMConfig((("conv", {}),) * 2, D, vocab_size=VOCAB, mlp_dim=80, dtype="float32", init_std=0.2, scan_layers=True)
MESHES = [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]
CASES = [(sizes, name) for sizes in MESHES for name in ("adamw", "muon")]
FEW = [(MESHES[-1], "adamw")]


def name_of(value):
    return "-".join(f"{k}{n}" for k, n in value.items()) if isinstance(value, dict) else str(value)


on_meshes = parametrize_some("sizes, name", CASES, FEW, ids=name_of)


@pytest.fixture(autouse=True)
def small_parameters_are_large(monkeypatch):
    monkeypatch.setattr(placement, "LARGE_BYTES", LARGE)


def batch(seed=0):
    inputs, labels = np.random.default_rng(seed).integers(VOCAB, size=(2, B, T), dtype=np.int32)
    return {"inputs": inputs, "labels": labels}


@functools.cache
def program_of(name, zero1, **sizes):
    values = OptimConfig(lr=1e-2, schedule="constant", name=name, zero1=zero1)
    config = TrainConfig(MODEL, TASKS["mqar"](preset="tiny"), values, batch_size=B, steps=4)
    return train_program(config, parallel.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]))


@functools.cache
def compiled_step(name, zero1, **sizes):
    return program_of(name, zero1, **sizes).lower_step(batch()).compile()


def begin(program):
    """Return a state that depends on no mesh, without the time that it takes to compile what draws one."""
    rng = np.random.default_rng(0)
    shapes = program.abstract_state
    params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(x.dtype), shapes.params)
    others = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return jax.device_put(dataclasses.replace(others, params=params), program.shardings)


@functools.cache
def steps_of(name, zero1, **sizes):
    """Return the state and the metrics after two steps."""
    program = program_of(name, zero1, **sizes)
    state, metrics = begin(program), {}
    for i in range(2):
        feed = parallel.Feed(program.mesh, B)
        state, metrics = compiled_step(name, zero1, **sizes)(state, feed.arrays(batch(i)))
    return state, metrics


def large_bytes(tree):
    """Return the bytes that a device holds of what is large."""
    leaves = [x for x in jax.tree.leaves(tree) if placement.is_large(x.shape)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


@on_meshes
def test_a_device_keeps_its_part_of_the_moments(sizes, name):
    whole, parts = (program_of(name, zero1, **sizes).abstract_state for zero1 in (False, True))
    assert large_bytes(parts.opt_state) * sizes["data"] == large_bytes(whole.opt_state)
    assert large_bytes(parts.params) == large_bytes(whole.params)
    assert large_bytes(steps_of(name, True, **sizes)[0].opt_state) == large_bytes(parts.opt_state)


@on_meshes
def test_values_are_those_without_it(sizes, name, close):
    state, metrics = steps_of(name, True, **sizes)
    expected, expected_metrics = steps_of(name, False, **sizes)
    close(metrics, expected_metrics, tolerance=1e-5)
    close(state.params, expected.params, tolerance=1e-3)  # Adam divides by gradients as small as rounding errors
    close(state.opt_state, expected.opt_state, tolerance=1e-4)


def exchanged(axis, name, zero1, **sizes):
    """Return how often arrays of so many elements are exchanged along an axis, but for single numbers."""
    shape = tuple(sizes.get(axis, 1) for axis in parallel.AXES)
    found = Program(compiled_step(name, zero1, **sizes).as_text()).exchanged(shape, parallel.AXES.index(axis))
    return collections.Counter((x.kind, math.prod(x.shape)) for x in found if x.shape and x.dtype == "f32")


@parametrize_some("sizes", MESHES, MESHES[-1:], ids=name_of)
def test_updates_are_gathered_once(sizes):
    """Each array's, of the size that a device has of the parameter; gradients are summed as they are without it."""
    params = program_of("adamw", True, **sizes).abstract_state.params
    large = [math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params) if placement.is_large(x.shape)]
    added = exchanged("data", "adamw", True, **sizes) - exchanged("data", "adamw", False, **sizes)
    assert added == collections.Counter(("all-gather", size) for size in large)


@on_meshes
def test_no_activation_is_exchanged_for_it(sizes, name):
    for axis in ("data", "fsdp"):
        added = exchanged(axis, name, True, **sizes) - exchanged(axis, name, False, **sizes)
        assert not [size for _, size in added if size % FACTOR_OF_T == 0]


@parametrize_some("sizes, zero1", itertools.product(MESHES, (False, True)), [(MESHES[-1], True)], ids=name_of)
def test_each_device_orthogonalizes_its_share_of_the_matrices(sizes, zero1):
    """Those of one shape are padded to a multiple of the devices; no product is made twice."""
    program = program_of("muon", zero1, **sizes)
    tx, state = optim.optimizer(program.config.optim, program.config.steps), program.abstract_state
    with jax.set_mesh(program.mesh):
        update = jax.jit(tx.update).lower(state.params, state.opt_state, state.params).compile()
    matrices = {(D, 2 * D): 2 * 3, (D, 80): 2 * 3}
    share = sum(math.ceil(count / 8) * 5 * 2 * (2 * N * M**2 + M**3) for (M, N), count in matrices.items())
    assert Program(update.as_text()).flops() == share


@parametrize_some("begins_with_it", [False, True], [True])
def test_a_checkpoint_goes_on_with_and_without_it_and_on_another_mesh(tmp_path, begins_with_it):
    first, then = {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}
    zeros = program_of("muon", begins_with_it, **first).abstract_state
    numbers = itertools.count()
    state = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, next(numbers), x.dtype), x.sharding), zeros)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, wait=True)
        for zero1, sizes in ((not begins_with_it, first), (begins_with_it, then), (not begins_with_it, then)):
            target = program_of("muon", zero1, **sizes).abstract_state
            _, restored = checkpoints.restore(target)
            for leaf, wanted, saved in zip(*map(jax.tree.leaves, (restored, target, state)), strict=True):
                assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
                np.testing.assert_array_equal(leaf, saved)


ODD = dataclasses.replace(MODEL, layers=(("conv", {}),), d_model=36, mlp_dim=90)
"""Eight devices divide no width of it by more than 4."""


def test_widths_that_the_mesh_does_not_divide_are_divided_together(close):
    """On a mesh with finer axes; values are those of one device."""
    config = dataclasses.replace(program_of("adamw", True, data=8).config, model=ODD)
    found = []
    for sizes in ({"fsdp": 8}, {"data": 1}):
        program = train_program(config, parallel.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]))
        feed = parallel.Feed(program.mesh, B)
        found.append(program.step(begin(program), feed.arrays(batch())))
        if "fsdp" in sizes:
            check_all_divided(program)
    (state, metrics), (expected, expected_metrics) = found
    close(metrics, expected_metrics, tolerance=1e-4)
    close(state.params, expected.params, tolerance=1e-3)


def check_all_divided(program):
    """Check that a device has an eighth of each kernel, all of which an axis alone would leave whole."""
    leaves = [x for x in jax.tree.leaves(program.abstract_state.params) if placement.is_large(x.shape)]
    assert [math.prod(x.sharding.shard_shape(x.shape)) for x in leaves] == [x.size // 8 for x in leaves]
    assert any("fsdp_0" in str(x.sharding.spec) for x in leaves)
    assert parallel.whole_parameters(program.abstract_state.params, program.mesh) == []

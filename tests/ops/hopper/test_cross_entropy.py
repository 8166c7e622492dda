"""The cross-entropy's Hopper kernels as far as a CPU can tell: refusals, lowering for an H100, and the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import entropy
from helpers.devices import gpus
from helpers.interpreted import replace_products
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from based_jax.ops.calls import CrossEntropyCall
from based_jax.ops.cross_entropy import IMPLEMENTATIONS, linear_cross_entropy
from based_jax.ops.dispatch import Implementation
from based_jax.ops.hopper import cross_entropy as hopper_cross_entropy
from pallas_kernels.hopper import cross_entropy as kernels


def _arrays(count=1024, vocab=8192, dim=128, dtype=jnp.bfloat16, lanes=()):
    hidden, table = jnp.zeros((*lanes, count, dim), dtype), jnp.zeros((*lanes, vocab, dim))
    return hidden, table, jnp.zeros((*lanes, count), jnp.int32)


@pytest.mark.parametrize(
    "arrays, words",
    [
        (_arrays(dtype=jnp.float32), "bfloat16, and is float32"),
        (_arrays(dim=264), "1 to 256 channels, and has 264"),
        (_arrays(count=0), "a label"),
        (_arrays(vocab=0), "a token"),
    ],
)
def test_refusals_name_the_value(arrays, words):
    with gpus():
        assert words in hopper_cross_entropy.supports(CrossEntropyCall(*arrays))
        assert hopper_cross_entropy.supports(CrossEntropyCall(*_arrays(dim=256))) is None
    with gpus("NVIDIA A100-SXM4-80GB"):
        assert "A100" in hopper_cross_entropy.supports(CrossEntropyCall(*_arrays()))
    arrays = _arrays()
    with gpus(shape=(2,), axes=AxisType.Explicit):
        assert "shard_map" in hopper_cross_entropy.supports(CrossEntropyCall(*arrays))


@pytest.mark.parametrize(
    "rows, length, start, pieces",
    [
        (16384, 8192, 2, 3),
        (65536, 8192, 2, 3),
        (65536, 8192, 6, 1),
        (1024, 8192, 2, 22),
        (1, 8192, 2, 64),
        (8192, 1, 2, 1),
    ],
)
def test_pieces_fill_the_chip(rows, length, start, pieces):
    assert hopper_cross_entropy.number_of_pieces(rows, length, kernels.Tiling(3, 128, 4), start) == pieces


def _gradients(hidden, table, labels):
    def loss(hidden, table):
        return linear_cross_entropy(hidden, table, labels, vocab_size=table.shape[0] - 7)[0].sum()

    return jax.grad(loss, argnums=(0, 1))(hidden, table)


def _lowered(call, arrays):
    return jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("count, dim", [(37, 48), (200, 256)])
def test_lowers_for_an_h100(count, dim):
    arrays = _arrays(count, 1000, dim)
    with gpus():
        text = _lowered(_gradients, arrays)
    assert all(f"cross_entropy_{name}" in text for name in ("forward", "hidden", "table"))


def test_lowers_under_vmap():
    hidden, table, labels = _arrays(256, 1000, 64, lanes=(3,))
    with gpus():
        assert "cross_entropy_table" in _lowered(jax.vmap(_gradients, (0, 0, None)), (hidden, table, labels[0]))


def test_lowers_under_shard_map_over_the_batch():
    arrays = _arrays(512, 1000, 64)
    rows = PartitionSpec("data")
    with gpus(shape=(2,)):
        call = jax.shard_map(_gradients, in_specs=(rows, PartitionSpec(), rows), out_specs=(rows, PartitionSpec()))
        assert "cross_entropy_table" in _lowered(call, arrays)


@pytest.mark.parametrize(
    "count, vocab, dim, scale, lanes",
    [
        (140, 130, 48, 100.0, 2),
        pytest.param(37, 1000, 48, 1.0, 1, marks=pytest.mark.long),
        pytest.param(200, 130, 128, 100.0, 2, marks=pytest.mark.long),
    ],
)
def test_interpreted_kernels_are_the_oracle(rng, normal, close, monkeypatch, count, vocab, dim, scale, lanes):
    monkeypatch.setattr(hopper_cross_entropy, "number_of_pieces", lambda *args: 2)
    monkeypatch.setitem(IMPLEMENTATIONS, "hopper_tiles", Implementation(hopper_cross_entropy.compute))
    replace_products(monkeypatch)
    inputs = entropy.inputs_of(rng, normal)
    given = jax.tree.map(lambda *x: np.stack(x), *(inputs(count, vocab, dim, "bfloat16", scale) for _ in range(lanes)))

    def by(impl):
        return functools.partial(entropy.run, functools.partial(linear_cross_entropy, impl=impl))

    wanted = jax.jit(jax.vmap(by("oracle")))(*given)
    run = by("hopper_tiles")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.jit(jax.vmap(run))(*given) if lanes > 1 else jax.jit(run)(*(x[0] for x in given))
    assert not get_races().races_found
    found = [x.reshape(y.shape) for x, y in zip(found, wanted, strict=True)]
    close(found[0], wanted[0], tolerance=1e-4)
    close(found[2:], wanted[2:], "bfloat16")
    np.testing.assert_array_equal(found[1], wanted[1])

"""A skip and a gate, and the RMS norm behind them: against fp64, and the Hopper kernels as far as a CPU can tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

from based_jax.bench import check
from based_jax.bench.cases import Case
from based_jax.errors import UserError
from based_jax.ops import gated_norm
from based_jax.ops.calls import GatedNormCall
from based_jax.ops.gated_norm import gated_rms_norm, gated_skip
from based_jax.ops.hopper import gated_norm as hopper_gated_norm


def inputs(normal, *shape, dtype="float32"):
    """Return y, u, z, skip and scale."""
    return *(normal(*shape, dtype=dtype) for _ in "yuz"), normal(shape[-1]), normal(shape[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 9, 24), (3, 5)])
def test_equals_fp64(shape, dtype, normal, close):
    arguments = inputs(normal, *shape, dtype=dtype)
    x, bare = jax.jit(lambda *arrays: (gated_rms_norm(*arrays, eps=0.1), gated_skip(*arrays[:4])))(*arguments)
    y, u, z, skip, scale = (np.asarray(z, np.float64) for z in arguments)
    gated = (y + skip * u) * z / (1 + np.exp(-z))
    assert x.dtype == bare.dtype == dtype
    close(bare, gated, dtype)
    close(x, gated / np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + 0.1) * scale, dtype)


INTERPRETED = [(shape, norms) for shape in ((2, 7, 256), (1, 3, 2304), (1, 9, 384)) for norms in (True, False)]


@parametrize_some("shape, norms", INTERPRETED, INTERPRETED[:2])
def test_kernels_equal_the_xla_form(shape, norms, normal, out_and_grads):
    """In Pallas' interpreter, which looks for races; of the second shape a row has three pieces."""
    arguments, cotangent = inputs(normal, *shape, dtype="bfloat16"), normal(*shape, dtype="bfloat16")
    arguments = arguments if norms else arguments[:4]

    def run(impl, dtype):
        arrays = *(np.asarray(x, jnp.dtype(dtype)) for x in arguments[:3]), *arguments[3:]

        def call(*arrays):
            return impl(GatedNormCall(*arrays, eps=0.1))

        return jax.tree.leaves(out_and_grads(call, arrays, np.asarray(cotangent, jnp.dtype(dtype))))

    expected = run(gated_norm._xla, "float32")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = run(hopper_gated_norm.compute, "bfloat16")
    for ours, right in zip(got, expected, strict=True):
        wide, right = (np.asarray(z, np.float64) for z in (ours, right))
        assert np.linalg.norm(wide - right) <= (5e-3 if ours.dtype == jnp.bfloat16 else 1e-5) * np.linalg.norm(right)
    assert not get_races().races_found


@pytest.mark.parametrize(
    "shape, dtype, words",
    [
        ((2, 512, 256), "float32", "y must be bfloat16, and is float32"),
        ((2, 512, 192), "bfloat16", "a multiple of 128 up to 4096, and are 192"),
        ((2, 512, 8192), "bfloat16", "and are 8192"),
        ((2, 128, 256), "bfloat16", "1024 tokens, and are 256"),
    ],
)
def test_refusals_name_the_value(shape, dtype, words, normal):
    arguments = *[jnp.zeros(shape, dtype)] * 3, *[jnp.zeros(shape[-1])] * 2
    with gpus(), pytest.raises(UserError, match=words):
        gated_rms_norm(*arguments, impl="hopper_rows")
    with pytest.raises(UserError, match="eps is -1"):
        gated_rms_norm(*inputs(normal, 2, 8), eps=-1)


def test_rows_whose_channels_lie_over_devices_are_left_to_xla():
    arguments = *[jnp.zeros((4, 1024, 256), "bfloat16")] * 3, *[jnp.zeros(256)] * 2
    with gpus(shape=(2, 2), names=("data", "tensor")):
        assert "and do over the mesh axes tensor" in hopper_gated_norm.supports(GatedNormCall(*arguments, 1e-5))


LOWERED = [(None, (8, 2048, 4096), True), (None, (3, 1025, 384), False), (2, (2, 512, 256), True)]


@parametrize_some("lanes, shape, norms", LOWERED, LOWERED[1:])
def test_lowers_for_an_h100(lanes, shape, norms):
    leading = () if lanes is None else (lanes,)
    wide = [jax.ShapeDtypeStruct((*leading, *shape), jnp.bfloat16)] * 3
    weights = [jax.ShapeDtypeStruct((*leading, shape[-1]), jnp.float32)] * (1 + norms)
    name, operation = ("gated_norm", gated_rms_norm) if norms else ("gated_skip", gated_skip)
    call = functools.partial(operation, impl="hopper")
    both = jax.value_and_grad(lambda *arrays: call(*arrays).astype(jnp.float32).sum(), range(4 + norms))
    with gpus():
        traced = jax.jit(both if lanes is None else jax.vmap(both)).trace(*wide, *weights)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"{name}_forward" in text and f"{name}_backward" in text


def test_lowers_under_shard_map():
    """Skip and scale are the same on all devices: their gradients are summed over them."""

    def gradients(*arrays):
        def loss(*arrays):
            return gated_rms_norm(*arrays, impl="hopper_rows").astype(jnp.float32).sum()

        return jax.grad(loss, range(5))(*arrays)

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = data, data, data, everywhere, everywhere
    wide, weights = jnp.zeros((4, 512, 256), "bfloat16"), jnp.zeros(256)
    with gpus(shape=(2,)):
        sharded = jax.shard_map(gradients, in_specs=specs, out_specs=specs)
        text = jax.jit(sharded).trace(wide, wide, wide, weights, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert "gated_norm_backward" in text and "all_reduce" in text


@pytest.mark.parametrize("name, weights", [("gated_skip", {"dskip"}), ("gated_rms_norm", {"dskip", "dscale"})])
def test_the_definition_is_the_operation(name, weights):
    [row] = check.rows_of([Case(name, (2, 128, 3), impl="xla")], seed=1)
    assert row["passed"] and set(row["errors"]) == {"x", "dy", "du", "dz"} | weights

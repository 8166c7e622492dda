"""The residual addition with its RMS norm: against fp64, and the Hopper kernels as far as a CPU can tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from based_jax.errors import UserError
from based_jax.ops import norm
from based_jax.ops.norm import IMPLEMENTATIONS, residual_rms_norm


def exact(r, y, scale, eps):
    total = np.asarray(r, np.float64) + np.asarray(y, np.float64)
    return total, total / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 9, 24), (3, 5)])
def test_equals_fp64(shape, dtype, normal, close):
    r, y, scale = normal(*shape), normal(*shape, dtype=dtype), normal(shape[-1])
    total, x = residual_rms_norm(r, y, scale, eps=0.1)
    assert (total.dtype, x.dtype) == (jnp.float32, dtype)
    wanted = exact(r, y, scale, 0.1)
    close(total, wanted[0])
    close(x, wanted[1], dtype)
    assert residual_rms_norm(r, y, scale, dtype="float16")[1].dtype == jnp.float16


@pytest.mark.parametrize(
    "shape, dtype, words",
    [
        ((2, 512, 256), "float32", "float32, float32"),
        ((2, 512, 192), "bfloat16", "multiple of 128 up to 4096, and are 192"),
        ((2, 512, 8192), "bfloat16", "and are 8192"),
        ((2, 128, 256), "bfloat16", "1024 tokens, and are 256"),
    ],
)
def test_refusals_name_the_value(shape, dtype, words):
    arguments = jnp.zeros(shape), jnp.zeros(shape, dtype), jnp.zeros(shape[-1])
    with gpus(), pytest.raises(UserError, match=words):
        residual_rms_norm(*arguments, impl="hopper")


def test_a_mesh_with_explicit_axes_needs_shard_map():
    r = jnp.zeros((2, 512, 256))
    arguments = r, r.astype(jnp.bfloat16), jnp.zeros(256), 1e-5, jnp.dtype("bfloat16")
    supports = IMPLEMENTATIONS["hopper"].supports
    with gpus(shape=(2,), axes=AxisType.Explicit):
        assert "shard_map" in supports(*arguments)
    with gpus(shape=(2,)):
        assert supports(*arguments) is None


@pytest.mark.parametrize("shape, lanes", [((8, 2048, 1024), None), ((3, 1025, 128), 2), ((2, 512, 4096), None)])
def test_lowers_for_an_h100(shape, lanes):
    def loss(r, y, scale):
        total, x = residual_rms_norm(r, y, scale)
        return total.sum() + x.astype(jnp.float32).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2))
    dtypes = ((shape, jnp.float32), (shape, jnp.bfloat16), (shape[-1:], jnp.float32))
    lead = () if lanes is None else (lanes,)
    arguments = [jax.ShapeDtypeStruct((*lead, *size), dtype) for size, dtype in dtypes]
    with gpus():
        traced = jax.jit(gradients if lanes is None else jax.vmap(gradients)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert [name for name in ("residual_rms_norm", "residual_rms_norm_backward") if name not in text] == []


def test_lowers_under_shard_map():
    """The scale is the same on all devices: its gradients are summed over them."""

    def gradients(r, y, scale):
        def loss(*args):
            total, x = residual_rms_norm(*args, impl="hopper")
            return total.sum() + x.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(r, y, scale)

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = (data, data, everywhere)
    r = jnp.zeros((4, 512, 256))
    with gpus(shape=(2,)):
        sharded = jax.shard_map(gradients, in_specs=specs, out_specs=specs)
        traced = jax.jit(sharded).trace(r, r.astype(jnp.bfloat16), jnp.zeros(256))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "residual_rms_norm_backward" in text and "all_reduce" in text


@pytest.mark.parametrize("shape", [(2, 35, 1024), (1, 37, 384), (4, 160, 128)])
def test_kernels_equal_fp64(normal, out_and_grads, shape):
    """In Pallas' interpreter, which looks for races."""
    r, y, scale = normal(*shape), normal(*shape, dtype="bfloat16"), normal(shape[-1])
    cotangents = normal(*shape), normal(*shape, dtype="bfloat16")

    def run(impl, dtype):
        def call(r, y, scale):
            return impl(r, y, scale, 1e-5, jnp.dtype(dtype))

        return out_and_grads(call, (r, y.astype(dtype), scale), (cotangents[0], cotangents[1].astype(dtype)))

    expected = run(norm._xla, "float32")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = run(norm._hopper, "bfloat16")
    for ours, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        wide, right = (np.asarray(z, np.float64) for z in (ours, right))
        limit = 5e-3 if ours.dtype == jnp.bfloat16 else 1e-5
        assert np.linalg.norm(wide - right) <= limit * np.linalg.norm(right)
    assert not get_races().races_found
